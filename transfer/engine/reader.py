"""Everything this engine asks of one owner: reads, and word of what becomes of its hand-offs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transfer import faults
from transfer.engine.budget import ByteBudget
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.links import Link, PeerLinks
from transfer.engine.memory import MemoryTable
from transfer.engine.workers import Workers
from transfer.errors import (
    DeadlineExceeded,
    FatalError,
    HandoffNotReady,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    RegistrationError,
    RetryableError,
    TransferError,
    TransportUnavailable,
)
from transfer.settings import TransferSettings
from transfer.spans import check_spans, merge_adjacent, overlaps_itself, total_bytes
from transfer.transports.base import DataChannel
from transfer.types import Credentials, PeerId, PeerInfo, Planner, ReadPlan

logger = logging.getLogger(__name__)

_TRIES = 2
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_NOTICE_TIMEOUT_S = 5.0
_NOT_READY_S = 10.0
"""How long an owner may take to offer what its ticket promised: a step of its model."""

# What a planner may raise when it is handed a peer's layout that makes no sense to it.
_PLANNER_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Notice:
    """A message to an owner whose answer nobody waits for.

    Attributes:
        what: for the log.
        credentials: of one start of the owner; the first that it knows is greeted with.
        send: sends it over a link, with a time limit in seconds.
        expires_at: monotonic time after which it is of no use.
    """

    what: str
    credentials: Sequence[Credentials]
    send: Callable[[Link, float], None]
    expires_at: float


class PeerReader:
    """Reads from one owner and notices to it, on threads of its own. Thread-safe."""

    def __init__(
        self,
        owner: PeerId,
        links: PeerLinks,
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

    def submit(self, handle: TransferHandle, credentials: Credentials, planner: Planner) -> bool:
        """Begin a read soon; False when closed."""
        with self._lock:
            self._handles[handle] = credentials.incarnation
        handle.when_final(self._forget)
        try:
            return self._reads.submit(lambda: self._read(handle, credentials, planner))
        except RuntimeError as error:
            handle.finish(TransportUnavailable(str(error), phase=Phase.CONNECT))
            return True

    def notify(self, notice: Notice) -> bool:
        """Send a notice soon, again and again until it arrives or expires; False when closed."""
        try:
            return self._notices.submit(lambda: self._deliver(notice))
        except RuntimeError as error:
            logger.warning("cannot tell %s: %s: %s", self._owner, notice.what, error)
            return True

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

    def _read(self, handle: TransferHandle, credentials: Credentials, planner: Planner) -> None:
        unforeseen = True
        try:
            _Read(handle, credentials, planner, self._links, self._memory, self._budget).run()
            unforeseen = False
            handle.finish(None)
        except TransferError as error:
            unforeseen = False
            error.peer = error.peer or str(self._owner)
            error.handoff_id = error.handoff_id or credentials.handoff_id
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


class _Read:
    """One read, on one thread, from connecting to confirmation."""

    def __init__(
        self,
        handle: TransferHandle,
        credentials: Credentials,
        planner: Planner,
        links: PeerLinks,
        memory: MemoryTable,
        budget: ByteBudget,
    ) -> None:
        self._handle = handle
        self._credentials = credentials
        self._planner = planner
        self._links = links
        self._memory = memory
        self._budget = budget
        self._plan: ReadPlan | None = None
        self._all_read = False
        self._read_id = ""

    def run(self) -> None:
        """Return when the owner confirmed; raise whatever else ends the read."""
        tries_left = _TRIES - 1
        ready_by = min(self._handle.deadline, time.monotonic() + _NOT_READY_S)
        pause_s = _FIRST_PAUSE_S / 20
        while True:
            self._handle.advance(TransferState.CONNECTING)
            faults.reach("reader.connecting", self._handle.owner.engine_id)
            try:
                self._try()
                return
            except HandoffNotReady:
                if time.monotonic() + pause_s >= ready_by or self._handle.wait(pause_s):
                    raise
                pause_s = min(pause_s * 2, _FIRST_PAUSE_S)
            except (PeerUnreachable, DeadlineExceeded) as error:
                # A connection attempt has less time than the whole read.
                if not tries_left or self._handle.interrupt.error is not None or self._late():
                    raise
                tries_left -= 1
                logger.info("will try once more: %s", error)

    def _try(self) -> None:
        handle = self._handle
        self._links.require_layout()
        with self._links.use(self._credentials, handle.deadline) as link:
            self._links.require_layout(link.info)
            plan = self._plan = self._plan or self._checked_plan(link.info)
            if not self._all_read:
                self._read(link, plan)
            handle.advance(TransferState.CONFIRMING)
            faults.reach("reader.confirming", self._handle.owner.engine_id)
            link.control.release(
                self._credentials, used=True, read_id=self._read_id, timeout_s=self._left_s()
            )
            faults.reach("reader.confirmed", self._handle.owner.engine_id)

    def _read(self, link: Link, plan: ReadPlan) -> None:
        while not self._all_read:
            channel = link.routes.channel
            try:
                self._read_from(link, channel, plan)
                self._all_read = True
            except TransportUnavailable as error:
                self._handle.interrupt.check()
                link.routes.lose(channel, error)
                self._handle.advance(TransferState.CONNECTING)

    def _read_from(self, link: Link, channel: DataChannel, plan: ReadPlan) -> None:
        handle = self._handle

        def settle() -> None:
            link.control.settle(self._left_s())

        if not plan.local.size:
            return
        with (
            self._budget.taken(total_bytes(plan.local), handle.interrupt, settle),
            channel.open_read(self._credentials, plan, self._left_s()) as session,
        ):
            self._read_id = session.read_id
            handle.attach(session)
            handle.advance(TransferState.READING)
            faults.reach("reader.reading", handle.owner.engine_id)
            session.run(handle.interrupt)

    def _checked_plan(self, info: PeerInfo) -> ReadPlan:
        try:
            plan = self._planner(info)
        except _PLANNER_ERRORS as error:
            raise FatalError(
                f"the plan failed: {type(error).__name__}: {error}", phase=Phase.READ
            ) from error
        plan = merge_adjacent(
            ReadPlan(local=check_spans(plan.local), remote=check_spans(plan.remote))
        )
        self._memory.check(plan.local, what="the local spans", phase=Phase.READ)
        if overlaps_itself(plan.local):
            raise RegistrationError("local spans overlap", phase=Phase.READ)
        return plan

    def _late(self) -> bool:
        return time.monotonic() >= self._handle.deadline

    def _left_s(self) -> float:
        left_s = self._handle.deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("no time left", phase=Phase.READ)
        return left_s
