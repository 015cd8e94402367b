"""Queue pairs as the two sides use them."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass

import numpy as np

from transfer.spans import total_bytes
from transfer.transports.rdma.device import Rail
from transfer.transports.rdma.handshake import End
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.verbs import CompletionQueue, QueuePair, Route
from transfer.types import ReadPlan

MAX_READS = 16
"""Reads under way at once on one pair; more are queued by the device."""

QUEUE_DEPTH = 256
BATCH_ROWS = 64
BATCHES_AT_ONCE = QUEUE_DEPTH // BATCH_ROWS


class LocalEnd:
    """A queue pair of ours that is to be connected to one of a peer's."""

    def __init__(self, rail: Rail, completions: CompletionQueue, depth: int, reads: int) -> None:
        self.rail = rail
        self._psn = secrets.randbelow(1 << 24)
        self._reads = reads
        self.pair: QueuePair = rail.device.queue_pair(completions, depth)

    def __repr__(self) -> str:
        return f"<LocalEnd {self.pair.number} of {self.rail}>"

    def describe(self, rail: int) -> End:
        """What the peer must know."""
        port = self.rail.port
        return End(
            rail=rail,
            ethernet=port.ethernet,
            number=self.pair.number,
            psn=self._psn,
            lid=port.lid,
            mtu=port.mtu,
            reads=self._reads,
            gid=self.rail.gid.raw,
        )

    def connect(self, peer: End) -> None:
        """Bring it up.

        Raises:
            VerbsError: the peer's end cannot be reached.
        """
        self.pair.connect(
            Route(
                port=self.rail.port.number,
                mtu=min(self.rail.port.mtu, peer.mtu),
                peer_number=peer.number,
                peer_psn=peer.psn,
                own_psn=self._psn,
                lid=peer.lid,
                gid=peer.gid if self._needs_gid(peer) else None,
                gid_index=self.rail.gid.index,
                reads=min(self._reads, peer.reads),
            )
        )

    def _needs_gid(self, peer: End) -> bool:
        """RoCE always; InfiniBand when the peer is in another subnet or has no local address."""
        return self.rail.port.ethernet or not peer.lid or peer.gid[:8] != self.rail.gid.raw[:8]


@dataclass(frozen=True, slots=True)
class Batch:
    """Reads that are asked for together, with the keys of both sides cut to size."""

    plan: ReadPlan
    size: int

    @classmethod
    def of(cls, plan: ReadPlan) -> Batch:
        return cls(plan, total_bytes(plan.local))


class Lane:
    """A reader's queue pair with what is under way on it. One read's at a time; one thread."""

    def __init__(self, rail: Rail, own_rail: int) -> None:
        self.rail = rail
        self._own_rail = own_rail
        self.far_rail = 0
        limits = rail.device.limits
        self._depth = min(QUEUE_DEPTH, limits.queue_depth)
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

    def connect(self, peer: End) -> None:
        """Bring it up; raises ``VerbsError``."""
        self._end.connect(peer)
        self.far_rail = peer.rail
        self.far_number = peer.number

    @property
    def idle(self) -> bool:
        return not self._under_way

    @property
    def has_room(self) -> bool:
        return not self.broken and len(self._under_way) < self._batches_at_once

    def post(self, batch: Batch, local: KeyMap, remote: KeyMap) -> None:
        """Ask for one batch; raises ``VerbsError``."""
        spans, far = batch.plan.local, batch.plan.remote
        local_keys = local.keys[local.row_of(spans[:, 0]), self._own_rail]
        far_keys = remote.keys[remote.row_of(far[:, 0]), self.far_rail]
        own_rows = zip(*np.ascontiguousarray(spans.T).tolist(), local_keys.tolist(), strict=True)
        far_rows = zip(far[:, 0].tolist(), far_keys.tolist(), strict=True)
        self._under_way.append(batch)
        self._end.pair.post_reads(1, list(own_rows), list(far_rows))

    def reap(self) -> tuple[int, int]:
        """Bytes that arrived since the last call, and the first status that is not success."""
        moved = 0
        while found := self._completions.poll(BATCHES_AT_ONCE):
            for _, status in found:
                if status:
                    self.broken = True
                    return moved, status
                moved += self._under_way.popleft().size
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
