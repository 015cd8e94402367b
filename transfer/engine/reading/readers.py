"""The readers of all owners, of which there is one each, from when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transfer.discovery.base import Discovery
from transfer.engine.memory import MemoryTable
from transfer.engine.reading.budget import ByteBudget
from transfer.engine.reading.notices import Notice
from transfer.engine.reading.owner_links import OwnerLinks
from transfer.engine.reading.read import ReadOrder
from transfer.engine.reading.reader import PeerReader
from transfer.errors import PeerUnreachable, Phase, TransferCancelled
from transfer.settings import TransferSettings
from transfer.transports.registry import Transports
from transfer.types import PeerId, PeerInfo


class PeerReaders:
    """Hands reads and notices to the reader of their owner. Thread-safe.

    Args:
        own: who reads, as owners hear it.
        memory: what reads may write to.
    """

    def __init__(
        self,
        own: PeerInfo,
        discovery: Discovery,
        transports: Transports,
        memory: MemoryTable,
        settings: TransferSettings,
    ) -> None:
        self._own = own
        self._discovery = discovery
        self._transports = transports
        self._memory = memory
        self._settings = settings
        self._budget = ByteBudget(settings.max_inflight_bytes)
        self._lock = threading.Lock()
        self._closed = False
        self._readers: dict[PeerId, PeerReader] = {}
        # Shut, but with threads that linger.
        self._dismissed: list[PeerReader] = []

    def __repr__(self) -> str:
        return f"<PeerReaders of {len(self)} peers>"

    def __len__(self) -> int:
        return len(self._readers)

    def submit(self, order: ReadOrder) -> None:
        """Begin a read soon.

        Raises:
            TransferCancelled: closed.
        """
        with self._reader(order.handle.owner) as reader:
            reader.submit(order)

    def notify(self, owner: PeerId, notice: Notice) -> None:
        """Send a notice soon, again and again until it arrives or expires.

        Raises:
            TransferCancelled: closed.
        """
        with self._reader(owner) as reader:
            reader.notify(notice)

    def owner_started(self, owner: PeerId, incarnation: str) -> None:
        """Only this start of an owner is there: fail what concerns others. Does not block."""
        self._fail_starts_but(incarnation, owner, "it started anew")

    def owner_left(self, owner: PeerId) -> None:
        """Fail what concerns an owner that is gone. Does not block."""
        self._fail_starts_but("", owner, "it left")
        self._dismiss_readers_of_departed()

    def shut(self) -> None:
        """Take nothing more and stop every read. Does not block. Idempotent."""
        with self._lock:
            self._closed = True
            readers = [*self._readers.values(), *self._dismissed]
        with ExitStack() as closing:  # each whether or not another one fails
            for reader in reversed(readers):
                closing.callback(reader.shut, closed_error)

    def join(self, notices_s: float) -> None:
        """After :meth:`shut`: wait for the threads, at most so long for notices under way."""
        with self._lock:
            readers = [*self._readers.values(), *self._dismissed]
        notices_until = time.monotonic() + notices_s
        for reader in readers:
            reader.join(max(0.0, notices_until - time.monotonic()))
        with self._lock:
            self._readers, self._dismissed = {}, []

    @contextmanager
    def _reader(self, owner: PeerId) -> Iterator[PeerReader]:
        """The reader of ``owner``, which is not dismissed within the block."""
        with self._lock:
            if self._closed:
                raise closed_error()
            reader = self._readers.get(owner)
            if reader is None:
                links = OwnerLinks(owner, self._own, self._discovery, self._transports)
                reader = PeerReader(owner, links, self._memory, self._budget, self._settings)
                self._readers[owner] = reader
            yield reader

    def _fail_starts_but(self, alive: str, owner: PeerId, why: str) -> None:
        with self._lock:
            reader = self._readers.get(owner)
        if reader is not None:
            reader.fail_starts_but(
                alive, lambda: PeerUnreachable(why, phase=Phase.DISCOVER, peer=str(owner))
            )

    def _dismiss_readers_of_departed(self) -> None:
        """Peers come and go under new names: keep nothing of those that are gone."""
        with self._lock:
            for peer, reader in list(self._readers.items()):
                if reader.quiet and self._discovery.lookup(peer) is None:
                    del self._readers[peer]
                    reader.shut(closed_error)
                    self._dismissed.append(reader)
            self._dismissed = [reader for reader in self._dismissed if reader.alive]


def closed_error() -> TransferCancelled:
    """What reads end with, and who asks for more is told, when the engine is closed."""
    return TransferCancelled("the engine is closed", phase=Phase.READ)
