"""The local view: records by peer, who waits for them, and who listens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic

from transfer.discovery.base import Listener, PeerEvent, PeerEventKind
from transfer.errors import PeerUnknown, Phase
from transfer.types import PeerId, WorkerRecord

log = logging.getLogger(__name__)


class PeerView:
    """Thread-safe table of records.

    Listeners run on a thread of their own, so that a slow one never holds up the thread that
    feeds the view. It is started with the first subscription.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: dict[PeerId, WorkerRecord] = {}
        self._subscriptions: list[_Subscription] = []
        self._events: ThreadPoolExecutor | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<PeerView of {len(self._records)} peers>"

    def put(self, record: WorkerRecord) -> None:
        """Add or replace a record; nothing happens if it is there already."""
        with self._changed:
            known = self._records.get(record.peer)
            if known == record or self._closed:
                return
            self._records[record.peer] = record
            kind = PeerEventKind.JOINED if known is None else PeerEventKind.UPDATED
            self._tell(PeerEvent(kind, record))
            self._changed.notify_all()

    def discard(self, peer: PeerId) -> None:
        """Remove a record; nothing happens if there is none."""
        with self._changed:
            if self._closed:
                return
            record = self._records.pop(peer, None)
            if record is not None:
                self._tell(PeerEvent(PeerEventKind.LEFT, record))

    def get(self, peer: PeerId) -> WorkerRecord | None:
        """The record, or ``None``. Takes no lock: one dictionary read is atomic."""
        return self._records.get(peer)

    def all(self) -> tuple[WorkerRecord, ...]:
        """All records, ordered by peer."""
        with self._changed:
            records = tuple(self._records.values())
        return tuple(sorted(records, key=lambda record: record.peer))

    def wait_for(self, peer: PeerId, timeout_s: float, source: str) -> WorkerRecord:
        """Block until the peer is there.

        Args:
            source: what was searched, for the message.

        Raises:
            PeerUnknown: after ``timeout_s`` seconds, or when the view is closed.
        """
        deadline = monotonic() + timeout_s
        with self._changed:
            while (record := self._records.get(peer)) is None:
                left_s = deadline - monotonic()
                if self._closed or left_s <= 0:
                    why = "discovery was closed" if self._closed else f"not within {timeout_s:g} s"
                    raise PeerUnknown(
                        f"no such worker in {source}: {why}", phase=Phase.DISCOVER, peer=str(peer)
                    )
                self._changed.wait(left_s)
            return record

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """See :meth:`transfer.discovery.base.Discovery.subscribe`."""
        subscription = _Subscription(listener)
        with self._changed:
            if not self._closed:
                if self._events is None:
                    self._events = ThreadPoolExecutor(1, thread_name_prefix="baton-peer-events")
                self._subscriptions.append(subscription)
                for record in self._records.values():
                    event = PeerEvent(PeerEventKind.JOINED, record)
                    self._events.submit(subscription, event).add_done_callback(_log_failure)

        def unsubscribe() -> None:
            subscription.active = False
            with self._changed:
                if subscription in self._subscriptions:
                    self._subscriptions.remove(subscription)

        return unsubscribe

    def close(self) -> None:
        """Freeze the view and end waits and subscriptions. Idempotent; does not block."""
        with self._changed:
            self._closed = True
            for subscription in self._subscriptions:
                subscription.active = False
            self._subscriptions.clear()
            events, self._events = self._events, None
            self._changed.notify_all()
        if events is not None:
            events.shutdown(wait=False, cancel_futures=True)

    def _tell(self, event: PeerEvent) -> None:
        """Queue an event. Called under the lock, so that all listeners see the same order."""
        if self._events is not None:
            for subscription in self._subscriptions:
                self._events.submit(subscription, event).add_done_callback(_log_failure)


class _Subscription:
    """One listener, until it is told to stop."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.active = True

    def __call__(self, event: PeerEvent) -> None:
        if self.active:
            self._listener(event)


def _log_failure(call: Future[None]) -> None:
    if not call.cancelled() and (error := call.exception()) is not None:
        log.error("a discovery listener raised", exc_info=error)
