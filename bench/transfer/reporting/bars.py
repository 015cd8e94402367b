"""The bars of the transfer engine, as ratios of medians of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.transfer.cases import ANEW, BAR_BLOCKS, BAR_TOTAL, KIB, MANY, Case, case_of, human_bytes
from bench.transfer.reporting.results import Outcome, Run

TCP, SHM = "baton tcp", "baton shm"
BEFORE = ", before"
"""Ends the names of another build of ours."""
MOONCAKE = ("mooncake tcp", "mooncake tcp, in parts")
NIXL, NIXL_TCP, IPERF, MEMCPY = ("nixl",), ("nixl tcp",), ("iperf3",), ("memcpy",)
_AS_FAST_AS_BEFORE = 0.97
_AS_QUICK_TO_CONNECT = 1.15
_SIXTY_FOUR = case_of(64 * KIB, BAR_TOTAL)


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "FAIL"
    NO_FIGURE = "no figure"


@dataclass(frozen=True)
class Bar:
    """One bar, judged.

    Attributes:
        what: case and system.
        wanted: in words.
        reached: in words, or why there is nothing to compare.
    """

    what: str
    wanted: str
    reached: str
    verdict: Verdict


def judge(run: Run) -> list[Bar]:
    """All bars whose cases this run has."""
    bars = []
    for block in BAR_BLOCKS:
        case = case_of(block, BAR_TOTAL)
        bars += [
            faster(run, case, TCP, MOONCAKE, 3.0),
            faster(run, case, TCP, NIXL_TCP, 5.0),
            faster(run, case, TCP, IPERF, 1.3),
            faster(run, case, SHM, NIXL, 1.3),
        ]
        if block >= 64 * KIB:
            bars.append(faster(run, case, SHM, MEMCPY, 0.6))
    for system in (TCP, SHM):
        bars.append(_many(run, system))
        bars += _before(run, system)
    return [bar for bar in bars if bar is not None]


def faster(
    run: Run, case: Case, system: str, peers: Sequence[str], factor: float, digits: int = 2
) -> Bar | None:
    """GB/s of ``system`` against the first of ``peers`` that works; None if either did not run.

    Args:
        factor: how many times the peer's rate is wanted.
        digits: decimals of ratio and rates.
    """
    ours = run.outcome(case, system)
    peer, theirs = _first_that_works(run, case, peers)
    if ours is None or theirs is None:
        return None
    size = human_bytes(case.total_bytes)
    what = f"{system}, {human_bytes(case.block_bytes)} blocks, {size}"
    wanted = f"{factor:g} x {peer}"
    if not ours.works:
        return Bar(what, wanted, f"failed: {ours.failure}", Verdict.FAIL)
    if not theirs.works:
        return Bar(what, wanted, f"{peer} failed", Verdict.NO_FIGURE)
    ratio = ours.gb_per_s / theirs.gb_per_s
    rates = f"{ours.gb_per_s:.{digits}f} to {theirs.gb_per_s:.{digits}f} GB/s"
    reached = f"{ratio:.{digits}f} ({rates})"
    return Bar(what, wanted, reached, _verdict(ratio >= factor))


def _many(run: Run, system: str) -> Bar | None:
    many, few = run.outcome(MANY, system), run.outcome(_SIXTY_FOUR, system)
    if many is None or few is None:
        return None
    what = f"{system}, {MANY.count:,} descriptors of {human_bytes(MANY.block_bytes)}"
    wanted = "works, 0.5 x its GB/s at 64 KiB"
    if not (many.works and few.works):
        return Bar(what, wanted, f"failed: {many.failure or few.failure}", Verdict.FAIL)
    ratio = many.gb_per_s / few.gb_per_s
    reached = f"{ratio:.2f} ({many.gb_per_s:.2f} to {few.gb_per_s:.2f} GB/s)"
    return Bar(what, wanted, reached, _verdict(ratio >= 0.5))


def _before(run: Run, system: str) -> list[Bar | None]:
    """Against another build of ours."""
    large = [case for case in run.cases if case.total_bytes > BAR_TOTAL // 2]
    bars = [
        faster(run, case, system, (system + BEFORE,), _AS_FAST_AS_BEFORE, digits=3)
        for case in large
    ]
    return [*bars, _connects(run, system)]


def _connects(run: Run, system: str) -> Bar | None:
    """How long a small read takes that connects first."""
    ours, theirs = run.outcome(ANEW, system), run.outcome(ANEW, system + BEFORE)
    if ours is None or theirs is None:
        return None
    what = f"{system}, {human_bytes(ANEW.total_bytes)} over a new connection, p50"
    wanted = f"at most {_AS_QUICK_TO_CONNECT:g} x the time of {system}{BEFORE}"
    if not ours.works:
        return Bar(what, wanted, f"failed: {ours.failure}", Verdict.FAIL)
    if not theirs.works:
        return Bar(what, wanted, f"{system}{BEFORE} failed", Verdict.NO_FIGURE)
    mine, other = ours.latency_s(50), theirs.latency_s(50)
    reached = f"{mine / other:.3f} ({1e3 * mine:.3f} to {1e3 * other:.3f} ms)"
    return Bar(what, wanted, reached, _verdict(mine <= _AS_QUICK_TO_CONNECT * other))


def _first_that_works(run: Run, case: Case, peers: Sequence[str]) -> tuple[str, Outcome | None]:
    for peer in peers:
        outcome = run.outcome(case, peer)
        if outcome is not None and outcome.works:
            return peer, outcome
    return peers[0], run.outcome(case, peers[0])


def _verdict(passed: bool) -> Verdict:
    return Verdict.PASS if passed else Verdict.FAIL
