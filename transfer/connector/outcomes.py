"""How hand-offs end, as each side sees it: the words of the metrics' label ``outcome``. Pure."""

from __future__ import annotations

from enum import StrEnum


class OfferOutcome(StrEnum):
    """How a hand-off ended at its owner."""

    RELEASED = "released"
    ABORTED = "aborted"
    EXPIRED = "expired"


class ReadOutcome(StrEnum):
    """How a hand-off ended at its reader."""

    OK = "ok"
    FORFEITED = "forfeited"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CORRUPTED = "corrupted"
    UNPROVEN = "unproven"


_WORST_LAST = (
    ReadOutcome.OK,
    ReadOutcome.CANCELLED,
    ReadOutcome.REFUSED,
    ReadOutcome.FAILED,
    ReadOutcome.UNPROVEN,
    ReadOutcome.CORRUPTED,
)


def worse(one: ReadOutcome, other: ReadOutcome | None) -> ReadOutcome:
    """Of a read's outcomes on two ranks, the one that counts for the request."""
    return one if other is None else max(one, other, key=_WORST_LAST.index)
