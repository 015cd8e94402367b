"""Discovery through etcd: records under a lease, and a watch that loses nothing.

Two threads, each with a connection of its own so that neither waits for the other: one keeps the
lease and writes records, the other follows the prefix. Neither touches what the model computes
with, and each does only a few short calls per lease time, so a busy interpreter delays them but
does not starve them; only a call that holds the GIL for most of a lease time could.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

from transfer import faults
from transfer.discovery.base import Discovery, Listener
from transfer.discovery.etcd_client import (
    EtcdClient,
    EtcdUnauthenticated,
    EtcdUnavailable,
    HistoryCompacted,
    WatchStream,
    load_pyetcd,
)
from transfer.discovery.etcd_connector import EtcdConnector
from transfer.discovery.mirror import PrefixMirror
from transfer.discovery.own_records import OwnRecords
from transfer.discovery.record import workers_prefix
from transfer.discovery.settings import EtcdSettings
from transfer.discovery.view import PeerView
from transfer.errors import ConfigurationError, PeerUnreachable, Phase, TransferCancelled
from transfer.types import PeerId, WorkerRecord

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
REFUSED_RETRY_S = 2.0
CLOSE_TIMEOUT_S = 1.0


class EtcdDiscovery(Discovery):
    """Records in etcd, under one lease per process.

    While etcd is away the view stays as it was, and own records are written again when it is
    back. A worker that lost its lease registers again with the same incarnation. A worker that
    another incarnation has replaced meanwhile does not push that one out.

    Returns at once; :meth:`ready` tells whether etcd was reached.

    Raises:
        ConfigurationError: the client library is not installed.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        load_pyetcd()
        self._settings = settings
        self._prefix = workers_prefix(settings.cluster)
        call_timeout_s = min(CALL_TIMEOUT_S, settings.lease_ttl_s / 2)
        self._view = PeerView()
        self._mirror = PrefixMirror(self._view, replay_s=settings.lease_ttl_s / 3)

        self._changed = threading.Condition()
        self._own = OwnRecords(settings, self._tell_waiters)
        self._stream: WatchStream | None = None
        self._closed = False

        self._stop = threading.Event()
        self._wake = threading.Event()
        # Touched by its thread, and by close() to break off a call.
        self._lease_loop = _Loop("lease", EtcdConnector(settings, call_timeout_s))
        self._watch_loop = _Loop("watch", EtcdConnector(settings, call_timeout_s))
        self._threads = [
            threading.Thread(
                target=self._run, args=(loop, step), name=f"baton-etcd-{loop.name}", daemon=True
            )
            for loop, step in (
                (self._lease_loop, self._lease_step),
                (self._watch_loop, self._watch_step),
            )
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "healthy" if self.healthy else "disconnected"
        return f"<EtcdDiscovery {self._where} {state}, {len(self._own)} own, {self._view!r}>"

    def publish(self, record: WorkerRecord) -> None:
        with self._changed:
            if self._closed:
                raise TransferCancelled("discovery is closed", phase=Phase.DISCOVER)
            self._own.publish(record)
        self._wake.set()

    def withdraw(self, peer: PeerId) -> None:
        self._own.withdraw(peer)
        self._tell_waiters()
        self._wake.set()

    def lookup(self, peer: PeerId) -> WorkerRecord | None:
        return self._view.get(peer)

    def wait_for(self, peer: PeerId, timeout_s: float) -> WorkerRecord:
        return self._view.wait_for(peer, timeout_s, f"etcd at {self._where}")

    def peers(self) -> tuple[WorkerRecord, ...]:
        return self._view.all()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        return self._view.subscribe(listener)

    def ready(self, timeout_s: float) -> None:
        deadline_s = monotonic() + timeout_s
        with self._changed:
            while not self._closed:
                refusal = self._lease_loop.refusal or self._watch_loop.refusal
                if refusal is not None:
                    raise refusal
                if self._mirror.listed and self._own.written and self.healthy:
                    return
                left_s = deadline_s - monotonic()
                if left_s <= 0:
                    raise self._unreachable(timeout_s)
                self._changed.wait(left_s)
        raise TransferCancelled("discovery is closed", phase=Phase.DISCOVER)

    @property
    def healthy(self) -> bool:
        return self._lease_loop.connected and self._watch_loop.connected

    @property
    def superseded(self) -> bool:
        return self._own.superseded

    @property
    def overwritten(self) -> int:
        return self._own.overwritten

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            stream = self._stream
            self._changed.notify_all()
        self._view.close()
        self._stop.set()
        self._wake.set()
        if stream is not None:
            stream.cancel()
        self._threads[0].join(0.2)
        for loop in (self._lease_loop, self._watch_loop):
            loop.connector.close()
        for thread in self._threads:
            thread.join(2 * CALL_TIMEOUT_S)
        if self._own.has_lease:
            self._revoke()

    # The threads

    def _run(self, loop: _Loop, step: Callable[[EtcdClient], None]) -> None:
        try:
            while not self._stop.is_set():
                pause_s = self._attempt(loop, step)
                if pause_s:
                    self._stop.wait(pause_s)
        finally:
            loop.connected = False
            loop.connector.close()

    def _attempt(self, loop: _Loop, step: Callable[[EtcdClient], None]) -> float:
        """One step; returns the seconds to wait before the next."""
        try:
            step(loop.connector.client())
        except EtcdUnauthenticated as error:
            return self._failed(loop, error, loop.connector.failed(same_endpoint=True))
        except EtcdUnavailable as error:
            return self._failed(loop, error, loop.connector.failed())
        except ConfigurationError as error:
            loop.connector.failed()
            with self._changed:
                if loop.refusal is None:
                    log.error("%s", error)
                loop.connected, loop.refusal = False, error
                self._changed.notify_all()
            return REFUSED_RETRY_S
        return 0.0

    def _failed(self, loop: _Loop, error: EtcdUnavailable, pause_s: float) -> float:
        if self._stop.is_set():
            return 0.0
        self._mirror.disturbed(monotonic(), self._own.lease_ttl_s)
        with self._changed:
            if loop.connected:
                log.warning("lost the %s connection; known peers stay: %s", loop.name, error)
            loop.connected, loop.error, loop.refusal = False, str(error), None
        return pause_s

    def _succeeded(self, loop: _Loop) -> None:
        loop.connector.succeeded()
        if loop.connected:
            return
        if loop.error:
            log.warning("the %s connection to etcd is back", loop.name)
            self._mirror.disturbed(monotonic(), self._own.lease_ttl_s)
        with self._changed:
            loop.connected, loop.error, loop.refusal = True, "", None
            self._changed.notify_all()

    # The lease thread

    def _lease_step(self, client: EtcdClient) -> None:
        self._wake.clear()
        faults.reach("discovery.lease")
        due_s = self._own.keep(client, monotonic())
        self._succeeded(self._lease_loop)
        due_s = min(due_s, self._mirror.settle(monotonic()))
        self._wake.wait(max(0.0, due_s - monotonic()))

    # The watch thread

    def _watch_step(self, client: EtcdClient) -> None:
        start = self._mirror.begin(client.list_prefix(self._prefix), monotonic())
        self._tell_waiters()
        stream = client.watch(self._prefix, start)
        with self._changed:
            self._stream = stream
            if self._closed:
                stream.cancel()
        try:
            for changes in stream:
                self._succeeded(self._watch_loop)
                self._mirror.apply(changes, monotonic())
                if self._own.doubt(changes.items, monotonic()):
                    self._wake.set()
        except HistoryCompacted:
            log.warning("etcd compacted the history under the watch; listing again")
            self._mirror.forget()

    # The rest

    def _tell_waiters(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _revoke(self) -> None:
        """Withdraw everything at once, if etcd is there; else the lease runs out by itself."""
        connector = EtcdConnector(self._settings, CLOSE_TIMEOUT_S)
        deadline_s = monotonic() + CLOSE_TIMEOUT_S
        try:
            while monotonic() < deadline_s:
                try:
                    self._own.revoke(connector.client())
                except EtcdUnavailable:
                    if connector.failed():
                        break
                else:
                    return
        except ConfigurationError as error:
            log.warning("%s", error)
        finally:
            connector.close()
        log.warning(
            "closed without etcd; own records, if any, stay until their lease of %d s ends",
            self._own.lease_ttl_s,
        )

    @property
    def _where(self) -> str:
        return ", ".join(str(endpoint) for endpoint in self._settings.parsed_endpoints)

    def _unreachable(self, timeout_s: float) -> PeerUnreachable:
        reason = self._lease_loop.error or self._watch_loop.error or "no answer yet"
        return PeerUnreachable(
            f"no etcd could be used within {timeout_s:g} s at {self._where} (last: {reason}); "
            "start etcd there, or correct the endpoints of discovery",
            phase=Phase.DISCOVER,
        )


class _Loop:
    """How one of the threads is doing."""

    def __init__(self, name: str, connector: EtcdConnector) -> None:
        self.name = name
        self.connector = connector
        self.connected = False
        self.error = ""
        self.refusal: ConfigurationError | None = None
