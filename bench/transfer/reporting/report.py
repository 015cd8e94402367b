"""The report in Markdown, and the curves for its plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.transfer.cases import (
    BAR_TOTAL,
    BLOCK_SWEEP,
    MANY,
    STREAM_SWEEP,
    STREAMS,
    TOTAL_SWEEP,
    TOTAL_SWEEP_BLOCK,
    Case,
    case_of,
    human_bytes,
)
from bench.transfer.host import Machine
from bench.transfer.reporting.bars import judge
from bench.transfer.reporting.results import Outcome, Run
from bench.transfer.reporting.tables import (
    bars_table,
    cell,
    cpu,
    failures_table,
    latency,
    load,
    rate,
    table,
)

_HOW = """\
Every system has an owner and a reader, each a process of its own with a pool of memory in pages of
4 KiB. A case is a number of blocks at random places, different ones on the two sides: the same
block ids in each of 30 regions, as a KV cache has them. The reader's clock runs from the call to
the last byte, for Baton to the owner's confirmation that the blocks stayed pinned. Descriptors
are prepared beforehand in the form that each system takes. All bytes are checked once, the ends of
every block after every sample. Systems take turns sample by sample; one that does not have the
turn is stopped, since some spin when idle. Percentiles are those of single reads, so with few
reads p99 is the slowest.

* **mooncake tcp**: one batch call per read; *in parts*: calls of 1000 descriptors, one after the
  other, for reads of so many that one call fails.
* **nixl**: UCX chooses how; **nixl tcp**: `UCX_TLS=tcp`. Requests are made from prepared lists
  and polled, after the first 0.5 ms with pauses, since its own threads spin; a notification goes
  to the owner.
* **iperf3**: 512 MiB per sample with the case's number of streams, out of one buffer that fits the
  processor's cache and into another; it scatters nothing. It takes the kernel's congestion control,
  as the other peers do; *reno*: that which Baton takes within a host (docs/adr/0020).
* **gloo**: `torch.distributed` send and recv of one run of memory; it scatters nothing.
* **before**: the transfer engine of another revision, with `--before`. Both builds then have fresh
  processes in every round, as the place of their pages in memory makes about 3 %.
* **memcpy**: `memmove` of the same blocks within one process, one thread.

A dash is a case that a system does not run. Those that do not let one choose the number of streams
run each case once, and stand under 2 streams. iperf3 always moves 512 MiB, so it stands only beside
reads of 100 to 256 MiB. *In parts* is run only where one call fails, and not for 100,000
descriptors, which take it seconds a read.

RDMA is measured by itself, with `make bench-rdma`."""


@dataclass(frozen=True)
class Panel:
    """One diagram: for each series a value per tick, None where it failed."""

    title: str
    x_label: str
    y_label: str
    ticks: list[str]
    series: dict[str, list[float | None]]


@dataclass(frozen=True)
class Curves:
    """What is plotted."""

    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class _Sweep:
    """Cases that differ in one thing."""

    title: str
    axis: str
    ticks: list[str]
    cases: list[Case]


def render(run: Run, plot: str) -> str:
    """The report.

    Args:
        plot: file name of the picture; empty for none.
    """
    machine = Machine.here()
    parts = [
        "# Transfer engine",
        (
            f"`make bench-transfer`, profile *{run.profile}*: {len(run.cases)} cases, medians of "
            f"{run.rounds} interleaved rounds, {run.seconds / 60:.1f} minutes. "
            f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, Python "
            f"{machine.python}, transparent huge pages *{machine.huge_pages}*, TCP congestion "
            f"control *{machine.congestion}*."
        ),
        (
            f"Load of the machine: {load(run.load_before)} before, {load(run.load_after)} after; "
            f"while something was measured, everything else used {run.others_cores:.2f} of "
            f"{machine.cores} cores."
        ),
        "## Bars",
        bars_table(judge(run)),
    ]
    if plot:
        parts.append(f"![GB/s, latency and CPU of all systems]({plot})")
    parts += ["## How", _HOW]
    for sweep in _sweeps(run):
        parts += [
            f"## {sweep.title}",
            f"GB/s, median and quartiles, by {sweep.axis}:",
            _table(run, sweep, rate),
            "Milliseconds of one read, p50 / p99:",
            _table(run, sweep, latency),
            "CPU seconds per GB, reader + owner:",
            _table(run, sweep, cpu),
        ]
    parts += ["## Failures", failures_table(run)]
    return "\n\n".join(parts) + "\n"


def curves(run: Run) -> Curves:
    """The diagrams that this run has the points for."""
    sweeps = [one for one in _sweeps(run) if len(one.cases) > 1 and one.axis != "case"]
    panels = [_panel(run, sweep, "GB/s", lambda outcome: outcome.gb_per_s) for sweep in sweeps]
    for sweep in sweeps:
        if sweep.axis in ("block size", "total size"):
            panels += [
                _panel(run, sweep, "ms, p50", lambda outcome: 1e3 * outcome.latency_s(50)),
                _panel(run, sweep, "ms, p99", lambda outcome: 1e3 * outcome.latency_s(99)),
            ]
    panels += [
        _panel(run, sweep, "CPU s per GB, both ends", lambda outcome: outcome.cpu_s_per_gb)
        for sweep in sweeps[:1]
    ]
    title = f"Scattered reads on loopback, medians of {run.rounds}, load {load(run.load_before)}"
    return Curves(title, panels)


def _sweeps(run: Run) -> list[_Sweep]:
    def sweep(title: str, axis: str, points: dict[str, Case]) -> _Sweep:
        present = {tick: case for tick, case in points.items() if case in run.cases}
        return _Sweep(title, axis, list(present), list(present.values()))

    total, block = human_bytes(BAR_TOTAL), human_bytes(TOTAL_SWEEP_BLOCK)
    sweeps = [
        sweep(
            f"Block size: {total}, {STREAMS} streams",
            "block size",
            {human_bytes(size): case_of(size, BAR_TOTAL) for size in BLOCK_SWEEP},
        ),
        sweep(
            f"Total size: blocks of {block}, {STREAMS} streams",
            "total size",
            {human_bytes(size): case_of(TOTAL_SWEEP_BLOCK, size) for size in TOTAL_SWEEP},
        ),
        sweep(
            f"Streams: {total} in blocks of {block}",
            "streams",
            {str(number): case_of(TOTAL_SWEEP_BLOCK, BAR_TOTAL, number) for number in STREAM_SWEEP},
        ),
        sweep(
            "Many small blocks",
            "case",
            {f"{MANY.count:,} blocks of {human_bytes(MANY.block_bytes)}": MANY},
        ),
    ]
    in_sweeps = {case for one in sweeps for case in one.cases}
    rest = {str(case): case for case in run.cases if case not in in_sweeps}
    # What one of the other sweeps has already is not shown again on its own.
    seen: set[Case] = set()
    shown = []
    for one in [*sweeps, sweep("Others", "case", rest)]:
        if not seen.issuperset(one.cases):
            shown.append(one)
            seen.update(one.cases)
    return shown


def _table(run: Run, sweep: _Sweep, figure: Callable[[Outcome], str]) -> str:
    rows = []
    for system in run.systems:
        outcomes = [run.outcome(case, system) for case in sweep.cases]
        if any(outcome is not None for outcome in outcomes):
            rows.append([system, *(cell(outcome, figure) for outcome in outcomes)])
    return table(["system", *sweep.ticks], rows)


def _panel(run: Run, sweep: _Sweep, y_label: str, value: Callable[[Outcome], float]) -> Panel:
    series: dict[str, list[float | None]] = {}
    for system in run.systems:
        outcomes = [run.outcome(case, system) for case in sweep.cases]
        points = [
            value(outcome) if outcome is not None and outcome.works else None
            for outcome in outcomes
        ]
        if any(point is not None for point in points):
            series[system] = points
    return Panel(sweep.title, sweep.axis, y_label, sweep.ticks, series)
