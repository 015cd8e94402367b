"""Tables in Markdown, and how an outcome reads in a cell of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.transfer.reporting.bars import Bar
from bench.transfer.reporting.results import Outcome, Run

NOT_RUN = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without a line end after the last row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bars_table(bars: Sequence[Bar]) -> str:
    if not bars:
        return "None of the bars' cases ran."
    rows = [[bar.what, bar.wanted, bar.reached, bar.verdict.value] for bar in bars]
    return table(["case", "at least", "reached", ""], rows)


def failures_table(run: Run) -> str:
    rows = [
        [system, str(case), outcome.failure.replace("|", "\\|")]
        for (case, system), outcome in run.outcomes.items()
        if not outcome.works
    ]
    return table(["system", "case", "reason"], rows) if rows else "None."


def cell(outcome: Outcome | None, figure: Callable[[Outcome], str]) -> str:
    """``figure`` of what works, else why there is none; None is a system that skips the case."""
    if outcome is None:
        return NOT_RUN
    return figure(outcome) if outcome.works else "failed"


def rate(outcome: Outcome) -> str:
    """GB/s, median and quartiles."""
    low, high = outcome.spread
    return f"**{outcome.gb_per_s:.3g}** ({low:.3g} to {high:.3g})"


def latency(outcome: Outcome) -> str:
    """Milliseconds of one read, p50 / p99."""
    return f"{1e3 * outcome.latency_s(50):.3g} / {1e3 * outcome.latency_s(99):.3g}"


def cpu(outcome: Outcome) -> str:
    """CPU seconds per GB, reader + owner."""
    return f"{outcome.reader_cpu_s_per_gb:.2f} + {outcome.owner_cpu_s_per_gb:.2f}"


def load(averages: tuple[float, float, float]) -> str:
    return " ".join(f"{average:.2f}" for average in averages)
