"""What the engine needs of discovery, as it is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from transfer.types import PeerId, WorkerRecord


class PeerEvent(Protocol):
    """One change of the view of peers."""

    @property
    def kind(self) -> str:
        """``joined``, ``updated`` or ``left``."""
        ...

    @property
    def record(self) -> WorkerRecord:
        """The new record; for ``left`` the last one known."""
        ...


class Discovery(Protocol):
    """The part of :class:`transfer.discovery.base.Discovery` that the engine uses."""

    @property
    def superseded(self) -> bool:
        """Whether another start of a worker published here has taken its place."""
        ...

    @property
    def overwritten(self) -> int:
        """How often another's value was found where an own record should be."""
        ...

    def publish(self, record: WorkerRecord) -> None:
        """Make a record visible to all; returns at once."""
        ...

    def withdraw(self, peer: PeerId) -> None:
        """Take back an own record; returns at once."""
        ...

    def lookup(self, peer: PeerId) -> WorkerRecord | None:
        """The peer's record in the local view; does not block."""
        ...

    def wait_for(self, peer: PeerId, timeout_s: float) -> WorkerRecord:
        """Block until the peer is in the view; raises ``PeerUnknown``."""
        ...

    def subscribe(self, listener: Callable[[PeerEvent], None]) -> Callable[[], None]:
        """Call ``listener`` for every change, beginning with the peers there are; gives a
        function that ends it."""
        ...
