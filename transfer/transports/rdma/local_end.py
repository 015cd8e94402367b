"""A queue pair of ours, before and while it is connected to a peer's."""

from __future__ import annotations

import secrets

from transfer.transports.rdma.handshake import End
from transfer.transports.rdma.rails import Rail
from transfer.transports.rdma.verbs.completion_queue import CompletionQueue
from transfer.transports.rdma.verbs.port import Gid, Port
from transfer.transports.rdma.verbs.queue_pair import QueuePair, Route

MAX_READS = 16
"""Reads under way at once on one pair; more are queued by the device."""


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
