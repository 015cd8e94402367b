"""What discovery promises: who is alive, where, and word when that changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeAlias

from transfer.types import PeerId, WorkerRecord


class PeerEventKind(StrEnum):
    """What happened to a peer."""

    JOINED = "joined"
    UPDATED = "updated"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """One change of the view.

    Attributes:
        record: the new record; for ``LEFT`` the last one known. ``UPDATED`` with another
            ``incarnation`` means that the worker restarted.
    """

    kind: PeerEventKind
    record: WorkerRecord


Listener: TypeAlias = Callable[[PeerEvent], None]


class Discovery(ABC):
    """Publishes own workers and keeps a local view of everybody's.

    Every method may be called from any thread. None but :meth:`wait_for`, :meth:`ready` and
    :meth:`close` blocks, and those block no longer than they say. Make it after a fork, not
    before: threads and connections do not survive one. From asyncio, call the blocking ones in
    a thread, and hand events over with ``loop.call_soon_threadsafe``.

    The view holds this process's own records as well.
    """

    @abstractmethod
    def publish(self, record: WorkerRecord) -> None:
        """Make a record visible to all, and keep it so until :meth:`withdraw` or :meth:`close`.

        Returns at once; :meth:`ready` waits until it is written. Publishing the same record again
        changes nothing; another record of the same peer replaces it, also one that an earlier
        incarnation left behind.

        Raises:
            ConfigurationError: the record cannot be published as it is.
            TransferCancelled: discovery is closed.
        """

    @abstractmethod
    def withdraw(self, peer: PeerId) -> None:
        """Take back an own record. Returns at once; nothing happens if it was not published."""

    @abstractmethod
    def lookup(self, peer: PeerId) -> WorkerRecord | None:
        """The peer's record in the local view, ``None`` if there is none."""

    @abstractmethod
    def wait_for(self, peer: PeerId, timeout_s: float) -> WorkerRecord:
        """Block until the peer is in the view.

        Raises:
            PeerUnknown: it was not within ``timeout_s`` seconds, or discovery was closed.
        """

    @abstractmethod
    def peers(self) -> tuple[WorkerRecord, ...]:
        """All records of the local view, ordered by peer."""

    @abstractmethod
    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` for every change of the view, in order, on one discovery thread.

        It first hears ``JOINED`` for each peer already in the view, so nothing falls between
        :meth:`peers` and this call. A listener may call any method of discovery but ``close``.
        It should return soon: it delays other listeners, though never the view or the lease. An
        exception it raises is logged, and it goes on being called.

        Returns:
            A function that ends the subscription; a call that has already begun may still finish
            after it.
        """

    @abstractmethod
    def ready(self, timeout_s: float) -> None:
        """Block until it is healthy, has listed peers for the first time and written own records.

        Raises:
            PeerUnreachable: not within ``timeout_s`` seconds; names the endpoints and what to do.
            ConfigurationError: the directory refuses us (user, password, permission).
            TransferCancelled: discovery is closed.
        """

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """Whether the directory answers now. The view stays usable when it does not."""

    @property
    def superseded(self) -> bool:
        """Whether another start of a worker published here has taken its place.

        Peers find that one now, and no hand-off of ours; this process should end.
        """
        return False

    @property
    def overwritten(self) -> int:
        """How often another's value was found where an own record should be.

        It is written again, unless it was another start's (:attr:`superseded`).
        """
        return 0

    @abstractmethod
    def close(self) -> None:
        """Withdraw own records and stop the threads. Idempotent; takes a few seconds at most.

        The view can still be read afterwards, but no longer changes.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
