"""Queue pairs as the two sides use them."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from transfer.spans import concat, total_bytes
from transfer.transports.rdma.device import Rail
from transfer.transports.rdma.handshake import End
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.verbs import CompletionQueue, Gid, Port, QueuePair, Read, Route
from transfer.types import ReadPlan, SpanArray

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
                gid=peer.gid if needs_gid(self.rail.port, self.rail.gid, peer) else None,
                gid_index=self.rail.gid.index,
                reads=min(self._reads, peer.reads),
            )
        )


def needs_gid(port: Port, gid: Gid, peer: End) -> bool:
    """Whether packets to ``peer`` carry global addresses: over RoCE always, over InfiniBand when it
    is in another subnet or has no local address."""
    return port.ethernet or not peer.lid or peer.gid[:8] != gid.raw[:8]


@dataclass(frozen=True, slots=True)
class Batch:
    """Reads that are asked for together: rows ``start`` to ``stop`` of the work."""

    start: int
    stop: int
    size_bytes: int


class Work:
    """What one read asks for, as plain numbers: taken out of the arrays once, not per batch.

    Args:
        pieces: each becomes a batch; cut where keys change.
        local: keys for all that is written.
        remote: keys for all that is read.
    """

    def __init__(self, pieces: Iterable[ReadPlan], local: KeyMap, remote: KeyMap) -> None:
        pieces = list(pieces)
        rows = np.cumsum([0, *(piece.local.shape[0] for piece in pieces)]).tolist()
        self.batches = [
            Batch(start, stop, total_bytes(piece.local))
            for start, stop, piece in zip(rows, rows[1:], pieces, strict=False)
        ]
        own = concat([piece.local for piece in pieces])
        far = concat([piece.remote for piece in pieces])
        self.addresses: list[int] = _device_addresses(local, own)
        self.lengths: list[int] = own[:, 1].tolist()
        self.far_addresses: list[int] = _device_addresses(remote, far)
        self._local_keys = _keys_per_rail(local, own)
        self._far_keys = _keys_per_rail(remote, far)

    def reads(self, batch: Batch, own_rail: int, far_rail: int) -> Iterator[Read]:
        """The rows of a batch with the keys for these devices."""
        rows = slice(batch.start, batch.stop)
        return zip(
            self.addresses[rows],
            self.lengths[rows],
            self._local_keys[own_rail][rows],
            self.far_addresses[rows],
            self._far_keys[far_rail][rows],
            strict=True,
        )


def _device_addresses(keys: KeyMap, spans: SpanArray) -> list[int]:
    return keys.device_addresses(spans[:, 0]).tolist() if spans.shape[0] else []


def _keys_per_rail(keys: KeyMap, spans: SpanArray) -> list[list[int]]:
    if not spans.shape[0]:
        return [[] for _ in range(keys.rails)]
    of_rows = keys.keys[keys.row_of(spans[:, 0])]
    return [of_rows[:, rail].tolist() for rail in range(keys.rails)]


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
        while found := self._completions.poll(BATCHES_AT_ONCE):
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
