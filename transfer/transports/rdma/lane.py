"""One way to an owner: a reader's queue pair with what is under way on it."""

from __future__ import annotations

from collections import deque

from transfer.transports.rdma.handshake import End
from transfer.transports.rdma.local_end import MAX_READS, LocalEnd
from transfer.transports.rdma.rails import Rail
from transfer.transports.rdma.work import BATCH_ROWS, Batch, Work

_QUEUE_DEPTH = 256
_BATCHES_AT_ONCE = _QUEUE_DEPTH // BATCH_ROWS


class Lane:
    """A reader's queue pair with what is under way on it. One read's at a time; one thread."""

    def __init__(self, rail: Rail, own_rail: int) -> None:
        self.rail = rail
        self._own_rail = own_rail
        self.far_rail = 0
        limits = rail.device.limits
        self._depth = min(_QUEUE_DEPTH, limits.queue_depth)
        self._batches_at_once = max(1, self._depth // BATCH_ROWS)
        self._completions = rail.device.completion_queue(
            min(self._depth + 1, limits.completions), events=True
        )
        made = False
        try:
            reads = min(MAX_READS, limits.reads_asked)
            self._end = LocalEnd(rail, self._completions, self._depth, max(1, reads))
            made = True
        finally:
            if not made:
                self._completions.close()
        self.fd = self._completions.fd
        self.far_number = 0
        self.broken = False
        self._under_way: deque[Batch] = deque()

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"{len(self._under_way)} batches"
        return f"<Lane {self._end!r} {state}>"

    def describe(self, far_rail: int) -> End:
        """What the owner must know."""
        return self._end.describe(far_rail)

    def pair_with(self, peer: End) -> None:
        """The owner made ``peer`` for it."""
        self._peer = peer
        self.far_rail = peer.rail
        self.far_number = peer.name

    def connect(self) -> None:
        """Bring it up, paired; raises ``VerbsError``."""
        self._end.connect(self._peer)

    @property
    def idle(self) -> bool:
        return not self._under_way

    @property
    def has_room(self) -> bool:
        return not self.broken and len(self._under_way) < self._batches_at_once

    def post(self, batch: Batch, work: Work) -> None:
        """Ask for one batch of ``work``; raises ``VerbsError``."""
        self._under_way.append(batch)
        reads = work.reads(batch, self._own_rail, self.far_rail)
        self._end.pair.post_reads(1, batch.stop - batch.start, reads)

    def reap(self) -> tuple[int, int]:
        """Bytes that arrived since the last call, and the first status that is not success."""
        moved = 0
        while found := self._completions.poll(_BATCHES_AT_ONCE):
            for _, status in found:
                if status:
                    self.broken = True
                    return moved, status
                moved += self._under_way.popleft().size_bytes
        return moved, 0

    def rearm(self) -> None:
        """``fd`` became readable: be told of the next end too."""
        self._completions.rearm()

    def close(self) -> list[Batch]:
        """Stop what is under way: local memory is not written any more. What did not arrive."""
        self.broken = True
        self._end.pair.close()
        self._completions.close()
        left, self._under_way = list(self._under_way), deque()
        return left
