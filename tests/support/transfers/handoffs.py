"""One owner's table of hand-offs: what it is offered, and what readers show it."""

from __future__ import annotations

from collections.abc import Callable

from transfer.engine.handoff import Handoff, Offer, Permit
from transfer.engine.owning.handoffs import HandoffTable
from transfer.spans import block_spans
from transfer.types import Claim, PeerId, ReaderProcess, SpanArray

TTL_S = 10.0
READER = ReaderProcess(PeerId("decode", 0), "d1")
GRANT = block_spans(1 << 20, 64, 64, [1, 2, 9])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_table(clock: Clock) -> HandoffTable:
    """That of incarnation ``start-1``."""
    return HandoffTable("start-1", clock, on_end=lambda: None)


def offer(handoff_id: str = "h", *, readers: int = 1, grant: SpanArray = GRANT) -> Offer:
    return Offer(handoff_id, 7, "secret", grant, readers, TTL_S)


def live(table: HandoffTable) -> list[Handoff]:
    """Those that are not over, oldest first."""
    with table._lock:
        return list(table._live.values())


def claim(
    handoff_id: str = "h",
    *,
    incarnation: str = "start-1",
    fence: int = 7,
    reader: str = "r",
    share: int = 1,
) -> Claim:
    return Claim(handoff_id, incarnation, fence, reader, share)


def begin(
    table: HandoffTable,
    claimed: Claim | None = None,
    spans: SpanArray = GRANT,
    reader: ReaderProcess = READER,
    revoked: Callable[[], None] = lambda: None,
) -> Permit:
    return table.begin_read(reader, claimed or claim(), spans, revoked)
