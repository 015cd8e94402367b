"""Writes what :mod:`bench.rdma.measure` printed, from standard input, as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.rdma.measurement import Measurement
from bench.rdma.profile import BATON, PERFTEST, judge
from bench.transfer.cases import Case, human_bytes
from bench.transfer.host import Machine, load
from bench.transfer.reporting.results import Outcome, Run
from bench.transfer.reporting.tables import (
    bars_table,
    cell,
    cpu,
    failures_table,
    latency,
    rate,
    table,
)
from bench.transfer.reporting.tables import load as load_text

_HOW = """\
Both read out of another process's memory on the same device with one-sided reads over two queue
pairs, and move as many bytes per sample. They take turns, sample by sample, and every round begins
with the other one; who does not have the turn is stopped or has ended.

* **baton rdma**: one hand-off. Its blocks lie scattered, at random places that differ on the two
  sides. The clock runs from the call to the owner's confirmation that the blocks stayed pinned:
  leave to read, translation of addresses and release are in it. All bytes are checked once, the
  ends of every block after every sample. It sleeps while it waits.
* **ib_read_bw**: perftest's, a server and a client for every sample. Its figure runs from the first
  read that is posted to the last completion. It reads the same memory over and over, and polls
  while it waits.

CPU seconds are those of the process that reads (perftest's client), of the one that is read from
(its server), and whatever else was busy meanwhile: what the kernel does for a device that is
software lands there, or on a process that it interrupts. Perftest's are the difference to a run of
five reads per queue pair, so its start is not in them; in ours there is none."""

_EMULATED = """\
The device is soft-RoCE in an emulated machine without KVM: the processor is emulated, and it is the
network, too. The ratios say what the engine costs on top of the reads; the absolute figures say
nothing about a card."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rdma.report", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    options = parser.parse_args()
    before = load()
    line = sys.stdin.read()
    if not line.strip():
        sys.exit("nothing was measured, so no report is written")
    try:
        measured = Measurement.from_json(line)
    except ValueError as error:
        parser.error(str(error))
    text = render(measured, Machine.here(), before, load())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def render(
    measured: Measurement,
    host: Machine,
    load_before: tuple[float, float, float],
    load_after: tuple[float, float, float],
) -> str:
    """The report.

    Args:
        host: where the report is written; where it was measured, too, unless that was emulated.
        load_before: of ``host``.
        load_after: of ``host``; what was measured is in it.
    """
    run = measured.run
    many = [case for case in run.cases if case.count > 1]
    one = [case for case in run.cases if case.count == 1]
    where = f"in a virtual machine with Linux {measured.kernel}, " if measured.emulated else ""
    parts = [
        "# RDMA",
        (
            f"`make bench-rdma`: {human_bytes(many[0].total_bytes)} per sample, medians of "
            f"{run.rounds} interleaved rounds, {run.seconds / 60:.1f} minutes, {where}on "
            f"{measured.device}. {host.processor}, {host.cores} cores, Linux {host.kernel}, Python "
            f"{host.python}. Load of the machine: {load_text(load_before)} before, "
            f"{load_text(load_after)} after."
        ),
        *([_EMULATED] if measured.emulated else []),
        "## Bars",
        bars_table(judge(run)),
        "## How",
        _HOW,
        "## Many blocks",
        "GB/s, median and quartiles, by block size:",
        _table(run, many, rate),
        "Milliseconds of one read of all blocks, p50 / p99, which is the slowest:",
        _table(run, many, latency),
        "CPU seconds per GB, reader + owner + everything else:",
        _table(run, many, lambda outcome: f"{cpu(outcome)} + {outcome.others_cpu_s_per_gb:.2f}"),
        "Samples:",
        _table(run, many, lambda outcome: str(len(outcome.samples))),
        "## One block",
        (
            f"Milliseconds of one hand-off of one block, connected, p50 / p99. {PERFTEST} measures "
            "rates only."
        ),
        _table(run, one, latency),
        "## Failures",
        failures_table(run),
    ]
    return "\n\n".join(parts) + "\n"


def _table(run: Run, cases: Sequence[Case], figure: Callable[[Outcome], str]) -> str:
    rows = [
        [system, *(cell(run.outcome(case, system), figure) for case in cases)]
        for system in (BATON, PERFTEST)
        if any(run.outcome(case, system) for case in cases)
    ]
    return table(["system", *(human_bytes(case.block_bytes) for case in cases)], rows)


if __name__ == "__main__":
    main()
