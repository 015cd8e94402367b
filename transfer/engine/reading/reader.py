"""Everything this engine asks of one owner: reads, and word of what becomes of its hand-offs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from transfer.engine.handle import TransferHandle
from transfer.engine.memory import MemoryTable
from transfer.engine.reading.budget import ByteBudget
from transfer.engine.reading.notices import Notice
from transfer.engine.reading.owner_links import OwnerLinks
from transfer.engine.reading.read import Read, ReadOrder
from transfer.engine.reading.workers import Workers
from transfer.errors import (
    FatalError,
    HandoffRefused,
    Phase,
    RetryableError,
    TransferError,
    TransportUnavailable,
)
from transfer.settings import TransferSettings
from transfer.types import PeerId

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_NOTICE_TIMEOUT_S = 5.0


class PeerReader:
    """Reads from one owner and notices to it, on threads of its own. Thread-safe."""

    def __init__(
        self,
        owner: PeerId,
        links: OwnerLinks,
        memory: MemoryTable,
        budget: ByteBudget,
        settings: TransferSettings,
    ) -> None:
        self._owner = owner
        self._links = links
        self._memory = memory
        self._budget = budget
        self._lock = threading.Lock()
        # Each with the owner's incarnation that it reads from.
        self._handles: dict[TransferHandle, str] = {}
        self._reads = Workers(f"baton-reads-{owner}", settings.max_reads_per_peer)
        self._notices = Workers(f"baton-notices-{owner}", 1)
        self._closing = threading.Event()

    def __repr__(self) -> str:
        return f"<PeerReader {self._owner} {len(self._handles)} reads, {self._links!r}>"

    @property
    def quiet(self) -> bool:
        """Whether it has nothing to do."""
        return self._reads.quiet and self._notices.quiet

    def submit(self, order: ReadOrder) -> None:
        """Begin a read soon. Not after :meth:`shut`."""
        handle = order.handle
        with self._lock:
            self._handles[handle] = order.credentials.incarnation
        handle.when_final(self._forget)
        try:
            self._reads.submit(lambda: self._read(order))
        except RuntimeError as error:
            handle.finish(TransportUnavailable(str(error), phase=Phase.CONNECT))

    def notify(self, notice: Notice) -> None:
        """Send a notice soon, again and again until it arrives or expires. As :meth:`submit`."""
        try:
            self._notices.submit(lambda: self._deliver(notice))
        except RuntimeError as error:
            logger.warning("cannot tell %s: %s: %s", self._owner, notice.what, error)

    @property
    def alive(self) -> bool:
        """Whether threads use it."""
        return self._reads.alive or self._notices.alive

    def fail_starts_but(self, alive: str, error: Callable[[], TransferError]) -> None:
        """Stop every read from, and cut every connection to, other starts of the owner than
        ``alive``, which is empty if none is. Later reads connect anew."""
        self._stop(error, alive)
        self._links.cut(alive)

    def shut(self, error: Callable[[], TransferError]) -> None:
        """Take nothing more and stop every read. Does not block."""
        self._reads.shut()
        with self._lock:
            self._closing.set()
        self._stop(error)
        self._notices.shut()
        if self.quiet:  # threads that linger need none
            self._links.close()

    def join(self, notices_s: float) -> None:
        """After :meth:`shut`: wait for the threads, at most so long for notices under way."""
        cutter = threading.Timer(notices_s, self._links.close)
        cutter.start()
        self._notices.join()
        cutter.cancel()
        cutter.join()
        self._links.close()
        self._reads.join()

    def _forget(self, handle: TransferHandle) -> None:
        with self._lock:
            self._handles.pop(handle, None)

    def _stop(self, error: Callable[[], TransferError], alive: str = "") -> None:
        with self._lock:
            handles = list(self._handles.items())
        for handle, incarnation in handles:
            if not alive or incarnation != alive:
                handle.stop(error())

    def _read(self, order: ReadOrder) -> None:
        handle = order.handle
        unforeseen = True
        try:
            Read(order, self._links, self._memory, self._budget).run()
            unforeseen = False
            handle.finish(None)
        except TransferError as error:
            unforeseen = False
            error.peer = error.peer or str(self._owner)
            error.handoff_id = error.handoff_id or handle.handoff_id
            handle.finish(error)
        finally:
            if unforeseen:  # the thread dies of it, but nobody waits for ever
                handle.finish(FatalError("failed unforeseen, see the log", phase=Phase.READ))

    def _deliver(self, notice: Notice) -> None:
        pause_s, credentials = _FIRST_PAUSE_S, deque(notice.credentials)
        while True:
            timeout_s = min(_NOTICE_TIMEOUT_S, notice.expires_at - time.monotonic())
            if timeout_s <= 0:
                logger.info("gave up to tell %s: %s", self._owner, notice.what)
                return
            try:
                with self._links.use(credentials[0], time.monotonic() + timeout_s) as link:
                    notice.send(link, timeout_s)
                return
            except HandoffRefused as error:
                logger.debug("%s was too late: %s", notice.what, error)
                credentials.popleft()
                if credentials:  # to greet with: what is not over is still to be told
                    continue
                return
            except FatalError as error:
                logger.info("cannot tell %s: %s: %s", self._owner, notice.what, error)
                return
            except RetryableError as error:
                logger.debug("will try again to tell %s: %s", notice.what, error)
            if self._closing.wait(pause_s):
                return
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
