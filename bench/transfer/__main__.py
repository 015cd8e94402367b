"""``python -m bench.transfer``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench.transfer.before import build_of
from bench.transfer.cases import Profile, full, quick, smoke
from bench.transfer.contestants import ROOT, builds, contestants
from bench.transfer.reporting import report
from bench.transfer.reporting.results import Run
from bench.transfer.runner import measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument(
        "--quick", action="store_true", help="the bars' cases only, 3 minutes; 4 with --before"
    )
    profile.add_argument("--smoke", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument(
        "--rounds", type=int, help="rounds of each case; with --before 5 samples in each"
    )
    parser.add_argument("--limit-minutes", type=float, default=38.0)
    parser.add_argument("--only", action="append", help="systems to run, by name; repeatable")
    parser.add_argument(
        "--before",
        metavar="REV",
        help="measure the transfer engine of that revision in place of the peers, and print the "
        "report only",
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench")
    parser.add_argument("--out", type=Path, help="Markdown file; the plot goes beside it")
    options = parser.parse_args()

    run = _measured(options)
    if options.out is None or options.before:
        print(report.render(run, plot=""))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture = options.out.with_suffix(".png")
    plotted = _plot(options.environments, report.curves(run), picture)
    text = report.render(run, plot=picture.name if plotted else "")
    options.out.write_text(text)
    print(text)


def _measured(options: argparse.Namespace) -> Run:
    chosen = _profile(options)
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name, ExitStack() as stack:
        scratch = Path(name)
        if options.before:
            chosen = chosen.for_builds()
            (scratch / "before").mkdir()
            packages = stack.enter_context(build_of(options.before, scratch / "before"))
            systems = builds(scratch, chosen.pool_bytes, packages)
        else:
            systems = contestants(options.environments.absolute(), chosen.pool_bytes, scratch)
        if options.only:
            systems = [system for system in systems if system.name in options.only]
        return measure(
            chosen,
            systems,
            limit_s=60 * options.limit_minutes,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )


def _profile(options: argparse.Namespace) -> Profile:
    if options.smoke:
        return smoke()
    make = quick if options.quick else full
    return make() if options.rounds is None else make(options.rounds)


def _plot(environments: Path, curves: report.Curves, picture: Path) -> bool:
    """matplotlib has an environment of its own."""
    python = environments.absolute() / "plot" / "bin" / "python"
    if not python.exists():
        print(f"no plot: no {python}", file=sys.stderr)
        return False
    command = [str(python), "-m", "bench.transfer.reporting.plot", str(picture.absolute())]
    data = json.dumps(asdict(curves))
    return subprocess.run(command, input=data, text=True, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    main()
