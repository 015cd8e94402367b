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
from dataclasses import dataclass
from time import monotonic

from transfer import faults
from transfer.discovery.base import Discovery, Listener
from transfer.discovery.etcd_client import (
    EtcdClient,
    EtcdConnector,
    EtcdUnauthenticated,
    EtcdUnavailable,
    HistoryCompacted,
    LeaseLost,
    WatchStream,
    load_pyetcd,
)
from transfer.discovery.mirror import PrefixMirror
from transfer.discovery.record import decode_record, encode_record, record_key, workers_prefix
from transfer.discovery.settings import EtcdSettings
from transfer.discovery.view import PeerView
from transfer.errors import (
    ConfigurationError,
    PeerUnreachable,
    Phase,
    ProtocolError,
    TransferCancelled,
)
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
        self._interval_s = settings.lease_ttl_s / 3
        call_timeout_s = min(CALL_TIMEOUT_S, settings.lease_ttl_s / 2)
        self._view = PeerView()
        self._mirror = PrefixMirror(
            self._view, hold_s=float(settings.lease_ttl_s), replay_s=self._interval_s
        )

        self._changed = threading.Condition()
        self._own: dict[PeerId, _OwnRecord] = {}
        self._withdrawn: list[_OwnRecord] = []
        self._stream: WatchStream | None = None
        self._closed = False

        self._stop = threading.Event()
        self._wake = threading.Event()
        self._lease_id = 0
        self._due_s = 0.0
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
        value = encode_record(record)
        key = record_key(self._settings.cluster, record.peer)
        with self._changed:
            if self._closed:
                raise TransferCancelled("discovery is closed", phase=Phase.DISCOVER)
            known = self._own.get(record.peer)
            if known is not None and known.value == value:
                return
            self._own[record.peer] = _OwnRecord(record, key, value)
        self._wake.set()

    def withdraw(self, peer: PeerId) -> None:
        with self._changed:
            own = self._own.pop(peer, None)
            if own is not None:
                self._withdrawn.append(own)
                self._changed.notify_all()
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
                if self._mirror.listed and all(own.put_revision for own in self._own.values()):
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
        with self._changed:
            return any(own.superseded for own in self._own.values())

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
        if self._lease_id:
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
        self._mirror.disturbed(monotonic())
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
            self._mirror.disturbed(monotonic())
        with self._changed:
            loop.connected, loop.error, loop.refusal = True, "", None
            self._changed.notify_all()

    # The lease thread

    def _lease_step(self, client: EtcdClient) -> None:
        self._wake.clear()
        faults.reach("discovery.lease")
        try:
            self._keep_lease(client)
            self._write_records(client)
        except LeaseLost:
            log.warning("the lease is lost; registering again")
            self._forget_lease()
            return
        self._succeeded(self._lease_loop)
        due_s = min(self._due_s, self._mirror.settle(monotonic()))
        self._wake.wait(max(0.0, due_s - monotonic()))

    def _keep_lease(self, client: EtcdClient) -> None:
        now_s = monotonic()
        with self._changed:
            withdrawn, wanted = list(self._withdrawn), bool(self._own)
        for own in withdrawn:
            client.delete_if_equal(own.key, own.value)
            self._withdrawn.remove(own)
        if wanted and not self._lease_id:
            self._lease_id = client.grant(self._settings.lease_ttl_s)
        elif self._lease_id and not wanted:
            client.revoke(self._lease_id)
            self._lease_id = 0
        elif now_s < self._due_s:
            return
        elif self._lease_id:
            client.refresh(self._lease_id)
        else:
            client.ping(self._prefix)
        # Counted from before the call: a slow answer must not stretch the interval.
        self._due_s = now_s + self._interval_s

    def _forget_lease(self) -> None:
        self._lease_id = 0
        with self._changed:
            for own in self._own.values():
                own.put_revision = 0

    def _write_records(self, client: EtcdClient) -> None:
        with self._changed:
            unwritten = [own for own in self._own.values() if not own.put_revision]
        if not self._lease_id:
            return  # published while this step was under way; the next one makes a lease
        for own in unwritten:
            revision = self._rewrite(client, own) if own.was_written else None
            if not own.was_written:
                # Whatever an earlier start of this worker left there is overwritten.
                revision = client.put(own.key, own.value, self._lease_id)
            with self._changed:
                own.was_written = True
                own.put_revision = revision or 0
                self._changed.notify_all()
        if any(not own.put_revision for own in unwritten):
            self._wake.set()

    def _rewrite(self, client: EtcdClient, own: _OwnRecord) -> int | None:
        """Write a record again that was lost, unless another incarnation has taken its place."""
        existing = client.get(own.key)
        if existing is not None and existing.value is not None:
            try:
                other = decode_record(existing.value, key=own.key)
            except ProtocolError:
                other = own.record  # not a worker's; overwrite it
            if other.incarnation != own.record.incarnation:
                log.warning(
                    "worker %s was replaced by incarnation %s; not registering %s again",
                    other.peer,
                    other.incarnation,
                    own.record.incarnation,
                )
                # Counts as written there: if the other one goes, the mirror lacks it.
                own.superseded = True
                return existing.mod_revision
        own.superseded = False
        revision = existing.mod_revision if existing is not None else 0
        return client.put_if_unchanged(own.key, own.value, self._lease_id, revision)

    # The watch thread

    def _watch_step(self, client: EtcdClient) -> None:
        start = self._mirror.begin(client.list_prefix(self._prefix), monotonic())
        self._check_own()
        with self._changed:
            self._changed.notify_all()
        stream = client.watch(self._prefix, start)
        with self._changed:
            self._stream = stream
            if self._closed:
                stream.cancel()
        try:
            for changes in stream:
                self._succeeded(self._watch_loop)
                self._mirror.apply(changes, monotonic())
                self._check_own()
        except HistoryCompacted:
            log.warning("etcd compacted the history under the watch; listing again")
            self._mirror.forget()

    def _check_own(self) -> None:
        """Have own records written again that somebody deleted."""
        with self._changed:
            for own in self._own.values():
                if own.put_revision and self._mirror.lacks(own.key, own.put_revision):
                    own.put_revision = 0
                    self._wake.set()

    # The rest

    def _revoke(self) -> None:
        """Withdraw everything at once, if etcd is there; else the lease runs out by itself."""
        connector = EtcdConnector(self._settings, CLOSE_TIMEOUT_S)
        deadline_s = monotonic() + CLOSE_TIMEOUT_S
        try:
            while monotonic() < deadline_s:
                try:
                    connector.client().revoke(self._lease_id)
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
            "closed without etcd; own records stay until their lease of %d s ends",
            self._settings.lease_ttl_s,
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


@dataclass(slots=True)
class _OwnRecord:
    """A record to keep alive.

    Attributes:
        put_revision: where it was written; 0 while it has to be (again).
        was_written: it has been there before, so a successor may have replaced it since.
        superseded: a successor has.
    """

    record: WorkerRecord
    key: str
    value: bytes
    put_revision: int = 0
    was_written: bool = False
    superseded: bool = False


class _Loop:
    """How one of the threads is doing."""

    def __init__(self, name: str, connector: EtcdConnector) -> None:
        self.name = name
        self.connector = connector
        self.connected = False
        self.error = ""
        self.refusal: ConfigurationError | None = None
