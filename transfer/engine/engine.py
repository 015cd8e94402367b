"""The transfer engine: offers this worker's memory, and reads that of others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from types import TracebackType
from typing import Self

from transfer.discovery.base import Discovery, PeerEvent, PeerEventKind
from transfer.engine.handle import TransferHandle
from transfer.engine.handoff import EndedHandoff, Offer
from transfer.engine.huge_pages import prefer_huge_pages
from transfer.engine.memory import MemoryRegion, MemoryTable, check_range
from transfer.engine.owning.handoffs import HandoffTable
from transfer.engine.owning.owner import Owner
from transfer.engine.reading.notices import release_notice, renewal_notices
from transfer.engine.reading.read import ReadOrder
from transfer.engine.reading.readers import PeerReaders, closed_error
from transfer.engine.timer import DeadlineTimer
from transfer.errors import ConfigurationError, Phase, RegistrationError, TransferCancelled
from transfer.settings import TransferSettings
from transfer.spans import check_spans
from transfer.transports.base import Listener
from transfer.transports.rdma.transport import RdmaTransport
from transfer.transports.registry import Transports
from transfer.types import Credentials, DmaBuf, PeerId, PeerInfo, Planner, WorkerRecord

_MAX_LAYOUT_BYTES = 1 << 20
_LAST_NOTICES_S = 1.0


class EngineState(StrEnum):
    NEW = "new"
    RUNNING = "running"
    CLOSED = "closed"


class TransferEngine:
    """Owner of hand-offs and reader of those of other engines.

    Every method may be called from any thread. None but those that say so blocks; bytes
    move on the engine's own threads. Make and start it after a fork, not before.

    Args:
        peer: who this worker is.
        incarnation: uuid of this start of the engine.
        role: published, for people.
        tp_size: published.
        layout_hash: what must agree for bytes to mean the same on both sides; never empty.
        layout: told to readers in the handshake, opaque here; at most 1 MiB.
        discovery: stays open when the engine is closed.

    Raises:
        ConfigurationError: an argument makes no sense.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        incarnation: str,
        role: str,
        tp_size: int,
        layout_hash: str,
        layout: bytes,
        discovery: Discovery,
        settings: TransferSettings,
    ) -> None:
        if not incarnation or not layout_hash or not peer.engine_id:
            raise _misconfigured("incarnation, layout_hash and engine_id must not be empty")
        if not 0 <= peer.rank < 1 << 32:
            raise _misconfigured(f"rank {peer.rank} is out of range")
        if len(layout) > _MAX_LAYOUT_BYTES:
            raise _misconfigured(f"layout has {len(layout)} bytes, at most {_MAX_LAYOUT_BYTES}")
        self._info = PeerInfo(peer, incarnation, layout_hash, layout)
        self._role = role
        self._tp_size = tp_size
        self._discovery = discovery
        self._settings = settings
        self._ended = threading.Event()
        self._table = HandoffTable(incarnation, time.monotonic, self._ended.set)
        self._transports = Transports(settings)
        self._memory = MemoryTable(self._transports)
        self._readers = PeerReaders(self._info, discovery, self._transports, self._memory, settings)
        self._timer = DeadlineTimer(f"baton-timer-{peer}")
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._state = EngineState.NEW
        self._listeners: list[Listener] = []
        self._unsubscribe = _nothing

    def __repr__(self) -> str:
        with self._lock:
            where = ", ".join(listener.address for listener in self._listeners)
        return (
            f"<TransferEngine {self._info.peer} {self._state.value} {where or 'not listening'}, "
            f"{self._table!r}, reads from {len(self._readers)} peers>"
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """Whether it is started and not closed, and readers are let in."""
        with self._lock:
            listening = all(listener.alive for listener in self._listeners)
        return self._state is EngineState.RUNNING and listening

    @property
    def registered(self) -> bool:
        """Whether peers can find it, as far as is known; False after another start replaced it."""
        return not self._discovery.superseded

    @property
    def overwritten(self) -> int:
        """How often another's value was found where its record should be."""
        return self._discovery.overwritten

    @property
    def incarnation(self) -> str:
        """Of this start; readers must show it."""
        return self._info.incarnation

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where readers reach it; empty unless it runs."""
        with self._lock:
            return tuple(listener.address for listener in self._listeners)

    def start(self) -> None:
        """Listen, watch the peers and publish this worker's record.

        Raises:
            ConfigurationError: the address cannot be listened on, or it was started before.
            RegistrationError: memory of a device was registered that RDMA devices do not take.
            RuntimeError: no thread can be started; the engine is closed then.
            TransferCancelled: it is closed.
        """
        with self._closing:
            self._check_open()
            if self._state is EngineState.RUNNING:
                raise _misconfigured("the engine was started before")
            owner = Owner(self._info, self._table, self._memory)
            listeners = self._transports.listen(owner, owner.advertise)
            with self._lock:
                self._listeners = listeners
                self._state = EngineState.RUNNING
            published = False
            try:
                self._timer.start()
                self._publish(tuple(listener.address for listener in listeners))
                self._unsubscribe = self._discovery.subscribe(self._on_peer_event)
                published = True
            finally:
                if not published:
                    self._shut_down()

    def close(self) -> None:
        """Withdraw the record, fail reads with ``TransferCancelled``, end offers, join threads.

        Takes a few seconds at most. Afterwards no memory is read or written by this process any
        more; a reader on the same host may still be reading what it will then find worthless.
        Idempotent; not from a planner.
        """
        with self._closing:
            self._shut_down()

    def register(self, address: int, length: int, dmabuf: DmaBuf | None = None) -> MemoryRegion:
        """Allow ``length`` bytes at ``address`` to be offered and read into.

        The kernel is asked to use huge pages for them.

        Args:
            dmabuf: for memory of a device. Its descriptor must be open until the region is closed.
                Only ``rdma`` moves such bytes, so the settings must allow nothing else.

        Raises:
            RegistrationError: that is no range of memory, or that of a device and ``transports``
                is not ``("rdma",)`` or an RDMA device does not take it. The last is told by
                :meth:`start` of memory that was registered before.
        """
        if dmabuf is not None and self._settings.transports != (RdmaTransport.scheme,):
            raise RegistrationError(
                f"device memory needs transports: [{RdmaTransport.scheme}], they are "
                f"{self._settings.transports}",
                phase=Phase.REGISTER,
            )
        if dmabuf is None:
            check_range(address, length)
            # Before RDMA devices hold its pages: those stay as they are.
            prefer_huge_pages(address, length)
        return self._memory.register(address, length, dmabuf)

    def wait_for_end(self, timeout_s: float) -> bool:
        """Block until an own hand-off or a submitted read ends, or has since the last call.

        For the one thread that polls them and has nothing else to do.

        Returns:
            whether one did within ``timeout_s``.
        """
        ended = self._ended.wait(timeout_s)
        if ended:  # one that comes right after the time is up is for the next call
            self._ended.clear()
        return ended

    def wake(self) -> None:
        """Make :meth:`wait_for_end` return, as if something had ended."""
        self._ended.set()

    # Owner

    def offer(self, offer: Offer) -> None:
        """Let readers with the right credentials read ``offer.grant`` until the hand-off ends.

        The blocks must stay as they are until :meth:`take_ended` names the hand-off.

        Raises:
            RegistrationError: the grant is malformed or not in registered memory.
            HandoffRefused: its id was offered before, or a number makes no sense.
            TransferCancelled: the engine does not run.
        """
        self._check_running()
        self._memory.check(check_spans(offer.grant), what="the offered spans", phase=Phase.REGISTER)
        self._table.offer(offer)
        self._expire_later(offer.handoff_id, time.monotonic() + offer.ttl_s)

    def make_ready(self, handoff_id: str) -> bool:
        """Let readers of an offer that was not ``ready`` begin; False if it is over or unknown."""
        return self._table.make_ready(handoff_id)

    def abort(self, handoff_id: str, reason: str) -> bool:
        """End an own offer; False if it is over or unknown."""
        return self._table.abort(handoff_id, reason)

    def take_ended(self) -> list[EndedHandoff]:
        """Own hand-offs that ended since the last call, each exactly once; their blocks may be
        freed."""
        return self._table.take_ended()

    # Reader

    def submit_read(
        self,
        owner: PeerId,
        credentials: Credentials,
        planner: Planner,
        deadline_s: float,
    ) -> TransferHandle:
        """Read from ``owner`` what ``planner`` says, then release the hand-off.

        Never raises for what concerns the transfer: that is in the handle.

        Args:
            planner: called on an engine thread once the owner's layout is known; local spans
                must be registered and must not overlap.
            deadline_s: seconds from now until the read fails at the latest.

        Raises:
            TransferCancelled: the engine does not run.
        """
        self._check_running()
        handle = TransferHandle(owner, credentials.handoff_id, deadline_s)
        self._readers.submit(ReadOrder(handle, credentials, planner))
        self._stop_when_due(handle)
        handle.when_final(lambda _: self._ended.set())
        return handle

    def submit_release(self, owner: PeerId, credentials: Credentials, used: bool) -> None:
        """Tell the owner that this reader is done (``used``) or will not read (not ``used``).

        Sent in the background, again until it arrives or the offer must have expired. A read
        that became ``DONE`` has released already.

        Raises:
            TransferCancelled: the engine does not run.
        """
        self._check_running()
        ttl_s = self._settings.ticket_ttl_s
        self._readers.notify(owner, release_notice(credentials, used=used, ttl_s=ttl_s))

    def submit_renew(self, owner: PeerId, credentials: Sequence[Credentials]) -> None:
        """Tell the owner that its hand-offs are still wanted; as :meth:`submit_release`."""
        self._check_running()
        for notice in renewal_notices(credentials, self._settings.ticket_ttl_s):
            self._readers.notify(owner, notice)

    def _stop_when_due(self, handle: TransferHandle) -> None:
        entry = self._timer.schedule(handle.deadline, handle.time_out)
        handle.when_final(lambda _: self._timer.cancel(entry))

    def _publish(self, addresses: tuple[str, ...]) -> None:
        self._discovery.publish(
            WorkerRecord(
                peer=self._info.peer,
                incarnation=self._info.incarnation,
                role=self._role,
                tp_size=self._tp_size,
                addresses=addresses,
                layout_hash=self._info.layout_hash,
                started_at_s=time.time(),
                http_url=self._settings.http_url,
            )
        )

    def _shut_down(self) -> None:
        with self._lock:
            was_running = self._state is EngineState.RUNNING
            self._state = EngineState.CLOSED
        if not was_running:
            return
        with ExitStack() as closing:
            # Called from the last to the first, each whether or not another one fails.
            closing.callback(self._forget)
            closing.callback(self._timer.close)
            for listener in reversed(self._listeners):
                closing.callback(listener.close)
            closing.callback(self._table.abort_all, "the engine is closed")
            closing.callback(self._readers.join, _LAST_NOTICES_S)
            closing.callback(self._discovery.withdraw, self._info.peer)
            # Before owners can hear that this reader left and fail its reads for that.
            closing.callback(self._readers.shut)
            closing.callback(self._unsubscribe)

    def _forget(self) -> None:
        with self._lock:
            self._listeners = []

    def _on_peer_event(self, event: PeerEvent) -> None:
        peer, incarnation = event.record.peer, event.record.incarnation
        if event.kind is PeerEventKind.LEFT:
            self._table.reader_left(peer)
            self._readers.owner_left(peer)
        elif incarnation:
            self._table.reader_left(peer, alive=incarnation)
            self._readers.owner_started(peer, incarnation)

    def _expire_later(self, handoff_id: str, at_s: float) -> None:
        self._timer.schedule(at_s, lambda: self._expire(handoff_id))

    def _expire(self, handoff_id: str) -> None:
        deadline = self._table.expire(handoff_id)
        if deadline is not None:
            self._expire_later(handoff_id, deadline)

    def _check_open(self) -> None:
        if self._state is EngineState.CLOSED:
            raise closed_error()

    def _check_running(self) -> None:
        if self._state is not EngineState.RUNNING:
            raise TransferCancelled(
                f"the engine is {self._state.value}, not running", phase=Phase.REGISTER
            )


def _nothing() -> None:
    pass


def _misconfigured(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
