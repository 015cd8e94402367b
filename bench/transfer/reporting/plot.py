"""Draws a report's curves, JSON on standard input: ``... plot out.png``.

Runs in an environment that has matplotlib and nothing else of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")
_COLUMNS = 3


def main() -> None:
    curves: dict[str, Any] = json.load(sys.stdin)
    panels = curves["panels"]
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    palette = pyplot.get_cmap("tab10")
    colors = {name: palette(number % 10) for number, name in enumerate(names)}
    rows = max(1, -(-len(panels) // _COLUMNS))
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(5 * _COLUMNS, 4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw(axis, panel, colors, handles)
    figure.suptitle(curves["title"])
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1
    )
    figure.savefig(sys.argv[1], dpi=110)


def draw(axis: Any, panel: dict[str, Any], colors: dict[str, Any], handles: dict[str, Any]) -> None:
    """One diagram; adds what the legend needs to ``handles``."""
    for name, values in panel["series"].items():
        points = [(at, value) for at, value in enumerate(values) if value is not None]
        (line,) = axis.plot(
            [at for at, _ in points],
            [value for _, value in points],
            marker="o",
            linewidth=2.5 if name.startswith("baton") else 1.2,
            color=colors[name],
        )
        handles.setdefault(name, line)
    axis.set_xticks(range(len(panel["ticks"])), panel["ticks"])
    axis.set_yscale("log")
    axis.set_title(panel["title"], fontsize=10)
    axis.set_xlabel(panel["x_label"])
    axis.set_ylabel(panel["y_label"])
    axis.grid(visible=True, which="both", alpha=0.25)


if __name__ == "__main__":
    main()
