"""What is read: cases, and the profiles that list them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

STREAMS = 2
"""Streams of every case that is not about their number."""


@dataclass(frozen=True, slots=True)
class Case:
    """One read of ``count`` blocks, done several times.

    Attributes:
        streams: for systems that let one choose.
        warm_up: reads at the start of every sample that are not counted.
        reads: reads of every sample that are.
        turns: samples of every system in each round. What is over in microseconds depends on where
            the host has put the processors, which changes in the course of seconds.
        anew: each read is the first over its connection.
    """

    block_bytes: int
    count: int
    streams: int = STREAMS
    warm_up: int = 1
    reads: int = 2
    turns: int = 1
    anew: bool = False

    def __str__(self) -> str:
        how = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        if self.anew:
            how = "new connection"
        return f"{self.count} x {human_bytes(self.block_bytes)}, {how}"

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.count

    @property
    def is_large(self) -> bool:
        """Whether its memory cannot be kept for all systems at once."""
        return self.total_bytes > 256 * MIB

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def case_of(block_bytes: int, total_bytes: int, streams: int = STREAMS) -> Case:
    """Blocks up to ``total_bytes``; small reads are repeated more often."""
    count = max(1, total_bytes // block_bytes)
    if total_bytes <= 64 * KIB:
        return Case(block_bytes, count, streams, warm_up=20, reads=200, turns=5)
    if total_bytes <= 32 * MIB:
        reads = min(20, 64 * MIB // total_bytes)
        return Case(block_bytes, count, streams, warm_up=2, reads=reads)
    if total_bytes <= 256 * MIB:
        return Case(block_bytes, count, streams)
    return Case(block_bytes, count, streams, warm_up=0, reads=1)


BAR_BLOCKS = (12 * KIB, 64 * KIB, MIB)
BAR_TOTAL = 128 * MIB
MANY = Case(4 * KIB, 100_000, warm_up=0, reads=1)
ANEW = Case(64 * KIB, 1, warm_up=5, reads=40, turns=5, anew=True)
"""For builds of ours beside each other; with peers, connecting is no part of a read."""

BLOCK_SWEEP = (4 * KIB, 12 * KIB, 64 * KIB, 256 * KIB, MIB)
TOTAL_SWEEP = (MIB, 16 * MIB, 128 * MIB, GIB)
TOTAL_SWEEP_BLOCK = 64 * KIB
STREAM_SWEEP = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Profile:
    """A choice of cases, and how often each is measured.

    Attributes:
        turns: samples of every system in each round, if the case does not want more.
        fresh: every round has processes of its own. Where the pages of a process lie in memory
            stays as it is while it lives, and makes about 3 % of its speed.
    """

    name: str
    cases: tuple[Case, ...]
    rounds: int
    turns: int = 1
    fresh: bool = False

    @property
    def pool_bytes(self) -> int:
        """Of each pool: twice the biggest case, so that blocks lie scattered. Pages that no case
        uses are never touched."""
        return 2 * max(case.total_bytes for case in self.cases) + 64 * MIB

    def for_builds(self) -> Profile:
        """The same for builds of ours beside each other, whose difference is small: also
        :data:`ANEW`, and fresh processes, each for several samples, as they are slow to start."""
        return replace(self, cases=(*self.cases, ANEW), turns=5, fresh=True)


def quick(rounds: int = 7) -> Profile:
    """Only what the bars are about."""
    bars = tuple(case_of(block, BAR_TOTAL) for block in BAR_BLOCKS)
    return Profile("quick", (*bars, MANY), rounds)


def full(rounds: int = 9) -> Profile:
    """The bars' cases, and sweeps over block size, total size and streams."""
    cases = [
        *(case_of(block, BAR_TOTAL) for block in BLOCK_SWEEP),
        MANY,
        *(case_of(TOTAL_SWEEP_BLOCK, total) for total in TOTAL_SWEEP),
        *(case_of(64 * KIB, BAR_TOTAL, streams) for streams in STREAM_SWEEP),
    ]
    return Profile("full", tuple(dict.fromkeys(cases)), rounds)


def smoke() -> Profile:
    """Tiny, to see that everything works."""
    cases = (case_of(12 * KIB, 2 * MIB), case_of(64 * KIB, 2 * MIB), case_of(MIB, 4 * MIB))
    return Profile("smoke", cases, 2)


def human_bytes(count: int) -> str:
    """``12 KiB``; exact where it can be."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
