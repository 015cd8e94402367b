"""One hand-off as its owner sees it: what is offered, who reads, how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

from transfer.types import ReaderProcess, SpanArray


class HandoffState(StrEnum):
    OFFERED = "offered"
    READING = "reading"
    RELEASED = "released"
    ABORTED = "aborted"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What an owner lets others read.

    Attributes:
        handoff_id: uuid, 32 hex digits; never offered twice.
        fence: number never reused within the engine's incarnation.
        secret: what the readers know of it, and nobody else.
        grant: what may be read; any order, rows may touch.
        readers: how many distinct readers must release before the hand-off ends; those that
            share (``Credentials.share``) count as one together.
        ttl_s: life without a read or a renewal, each of which begins it anew.
        ready: whether the bytes are there. Readers of an offer that is not wait until it is; it can
            be given up, renewed and ended before.
    """

    handoff_id: str
    fence: int
    secret: str = field(repr=False)
    grant: SpanArray
    readers: int
    ttl_s: float
    ready: bool = True


@dataclass(frozen=True, slots=True)
class EndedHandoff:
    """A hand-off that is over: its blocks may be freed.

    Attributes:
        state: ``RELEASED``, ``ABORTED`` or ``EXPIRED``.
        reason: for people.
    """

    handoff_id: str
    state: HandoffState
    reason: str


class Permit:
    """Leave to read, given by :meth:`HandoffTable.begin_read`."""

    __slots__ = ("handoff", "revoke", "valid")

    def __init__(self, handoff: Handoff, revoke: Callable[[], None]) -> None:
        self.handoff = handoff
        self.revoke = revoke
        self.valid = True

    def __repr__(self) -> str:
        return f"<Permit {self.handoff.offer.handoff_id} {'valid' if self.valid else 'revoked'}>"


@dataclass(frozen=True, slots=True)
class Release:
    """How a reader was counted off.

    Attributes:
        used: whether it read.
        read_id: of the one-sided read that it confirmed; empty for others.
        share: it is one of so many that count as one reader.
    """

    used: bool
    read_id: str
    share: int


@dataclass(slots=True, eq=False)
class Handoff:
    """One hand-off, as the table keeps it; the table's lock guards it."""

    offer: Offer
    cover: SpanArray
    deadline_s: float
    state: HandoffState = HandoffState.OFFERED
    reason: str = ""
    # Reader names: how each was counted off, and which process reads for those that were not.
    released: dict[str, Release] = field(default_factory=dict)
    counted_off: Fraction | int = 0
    reading: dict[str, ReaderProcess] = field(default_factory=dict)
    # One-sided reads that began: their ids, and the reader's name.
    one_sided: dict[str, str] = field(default_factory=dict)
    permits: set[Permit] = field(default_factory=set)

    @property
    def readers_left(self) -> int:
        """Readers that were not counted off, those that were in part included."""
        return self.offer.readers - math.floor(self.counted_off)

    def count_off(self, reader: str, release: Release) -> None:
        """``reader`` is through; called once for each."""
        self.released[reader] = release
        self.reading.pop(reader, None)
        # Exact: thirds add up to one. Kept, as a hand-off may have very many readers.
        self.counted_off += 1 if release.share == 1 else Fraction(1, release.share)

    @property
    def live(self) -> bool:
        return self.state in (HandoffState.OFFERED, HandoffState.READING)
