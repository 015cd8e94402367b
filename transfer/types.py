"""The nouns that all of ``transfer`` shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

SpanArray: TypeAlias = NDArray[np.uint64]
"""Spans of memory: shape ``[n, 2]``, C-contiguous, columns ``(address, length)`` in bytes.

This is also the memory layout of ``struct iovec`` on 64-bit Linux, so that an array can be
handed to ``readv``/``writev`` as it is.
"""


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """One worker: the vLLM engine it belongs to and its tensor-parallel rank."""

    engine_id: str
    rank: int

    def __str__(self) -> str:
        return f"{self.engine_id}/{self.rank}"


@dataclass(frozen=True, slots=True)
class ReaderProcess:
    """Who opens connections to an owner, as it says in the handshake: one start of a peer."""

    peer: PeerId
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What one worker publishes about itself. Written under a lease, watched by all.

    Attributes:
        incarnation: uuid of this start of the engine; a restart has another one. Empty when the
            source cannot know it (static discovery); the handshake then tells it.
        addresses: ``tcp://host:port`` and the like.
        layout_hash: what must agree for bytes to mean the same on both sides; empty as above.
        started_at_s: Unix time.
        http_url: of the engine's own OpenAI server, for proxies; empty if it has none.
    """

    peer: PeerId
    incarnation: str
    role: str
    tp_size: int
    addresses: tuple[str, ...]
    layout_hash: str
    started_at_s: float
    http_url: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """Which hand-off of which owner a reader means, and who it is.

    Attributes:
        handoff_id: uuid, 32 hex digits.
        incarnation: the owner's start that made the offer.
        fence: number never reused within that incarnation.
        reader: names this read among the ``readers`` that the offer admits; a repeated release
            by the same reader counts once.
        share: how many readers, this one among them, are together one of those that the offer
            admits: the ranks of one engine that each read a part of the blocks. At least 1.
    """

    handoff_id: str
    incarnation: str
    fence: int
    reader: str
    share: int = 1


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a reader needs for one hand-off: its claim, and the secret that makes it good.

    Attributes:
        handoff_id: see :class:`Claim`, as for the others.
        secret: known to the owner and the holders of its ticket; 32 hex digits in Baton's tickets.
    """

    handoff_id: str
    incarnation: str
    fence: int
    secret: str = field(repr=False)
    reader: str
    share: int = 1

    @property
    def claim(self) -> Claim:
        """All but the secret, which does not cross."""
        return Claim(self.handoff_id, self.incarnation, self.fence, self.reader, self.share)


@dataclass(frozen=True, slots=True)
class DmaBuf:
    """Memory of another device, as the kernel shares it between devices.

    Processors do not touch it; RDMA devices do.

    Attributes:
        fd: of the dma-buf.
        offset: byte of it at which the memory begins.
    """

    fd: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What an owner says of itself in the handshake.

    Attributes:
        layout: opaque to the engine; the layer above describes its memory in it.
        addresses: where its memory can be read other than by the transport that carried the
            handshake. Unlike those of a record they cannot be of an earlier start.
    """

    peer: PeerId
    incarnation: str
    layout_hash: str
    layout: bytes
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Where bytes go and come from: row i of ``local`` receives row i of ``remote``.

    Both arrays have the same shape ``[n, 2]`` and equal lengths row by row.
    """

    local: SpanArray
    remote: SpanArray


Planner: TypeAlias = Callable[[PeerInfo], ReadPlan]
"""Makes the plan once the peer's layout is known. Called on an engine thread; may raise
:class:`~transfer.errors.LayoutMismatch`."""
