"""The records of this process in etcd: under one lease, and as it wrote them.

A record is read back with every renewal of the lease, for a worker whose key holds something else
is lost to its readers although its lease is kept: another value was written over it by hand or by
mistake, or another start of the worker took the name.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transfer.discovery.etcd_client import EtcdClient, LeaseLost
from transfer.discovery.listing import KeyValue
from transfer.discovery.record import decode_record, encode_record, record_key
from transfer.discovery.settings import EtcdSettings
from transfer.errors import ProtocolError
from transfer.types import PeerId, WorkerRecord

log = logging.getLogger(__name__)


class OwnRecords:
    """Grants and renews the lease, writes the records under it, and looks after them.

    :meth:`keep` and :meth:`revoke` are for the lease thread, everything else for any thread.

    Args:
        on_change: called without a lock held when a record was written or found elsewhere.
    """

    def __init__(self, settings: EtcdSettings, on_change: Callable[[], None]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._lock = threading.Lock()
        self._records: dict[PeerId, _OwnRecord] = {}
        self._withdrawn: list[_OwnRecord] = []
        self._overwritten = 0
        self._lease_id = 0
        self._lease_ttl_s = settings.lease_ttl_s
        self._due_s = 0.0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def has_lease(self) -> bool:
        """Whether a lease is held, as far as is known."""
        return bool(self._lease_id)

    @property
    def lease_ttl_s(self) -> int:
        """How long records outlive this process: what etcd granted; before, what it is asked."""
        return self._lease_ttl_s

    @property
    def _interval_s(self) -> float:
        return self._lease_ttl_s / 3

    @property
    def written(self) -> bool:
        """Whether all records are in etcd, as far as is known."""
        with self._lock:
            return all(own.revision for own in self._records.values())

    @property
    def superseded(self) -> bool:
        """Whether another start has taken the place of one of them."""
        with self._lock:
            return any(own.superseded for own in self._records.values())

    @property
    def overwritten(self) -> int:
        """How often another's value was found in the place of a record."""
        return self._overwritten

    def publish(self, record: WorkerRecord) -> None:
        """Have a record written; raises ``ConfigurationError`` if it cannot be."""
        key = record_key(self._settings.cluster, record.peer)
        own = _OwnRecord(record, key, encode_record(record))
        with self._lock:
            known = self._records.get(record.peer)
            if known is not None and known.value == own.value:
                return
            self._records[record.peer] = own

    def withdraw(self, peer: PeerId) -> None:
        """Have a record deleted, if there is one."""
        with self._lock:
            own = self._records.pop(peer, None)
            if own is not None:
                self._withdrawn.append(own)

    def doubt(self, changes: Iterable[KeyValue], now_s: float) -> bool:
        """Take note of watched changes; returns whether :meth:`keep` should look at once.

        Not for a record that was written just now, which the next renewal looks at: two who
        contest a key should not do so in a loop.
        """
        doubted = False
        changed = {item.key: item.mod_revision for item in changes}
        with self._lock:
            for own in self._records.values():
                if changed.get(own.key, 0) > own.revision > 0:
                    own.doubted = now_s >= own.written_at_s + self._interval_s
                    doubted |= own.doubted
        return doubted

    def keep(self, client: EtcdClient, now_s: float) -> float:
        """Do what is due; returns when to call again, if not sooner. Raises as ``EtcdClient``."""
        try:
            renewed = self._keep_lease(client, now_s)
            with self._lock:
                records = tuple(self._records.values())
            for own in records:
                if renewed or own.doubted or not own.revision:
                    self._look_after(client, own, now_s)
        except LeaseLost:
            log.warning("the lease is lost; registering again")
            self._forget_lease()
            return now_s
        return self._due_s if self.written else now_s

    def revoke(self, client: EtcdClient) -> None:
        """Delete all records at once."""
        client.revoke(self._lease_id)

    def _keep_lease(self, client: EtcdClient, now_s: float) -> bool:
        """Returns whether the lease was granted or renewed.

        There is one even if nothing is published: it tells how long those of others live.
        """
        for own in list(self._withdrawn):
            client.delete_if_equal(own.key, own.value)
            self._withdrawn.remove(own)
        if not self._lease_id:
            self._grant(client)
        elif now_s < self._due_s:
            return False
        else:
            client.refresh(self._lease_id)
        # Counted from before the call: a slow answer must not stretch the interval.
        self._due_s = now_s + self._interval_s
        return True

    def _grant(self, client: EtcdClient) -> None:
        wanted_s = self._settings.lease_ttl_s
        lease = client.grant(wanted_s)
        if lease.ttl_s not in (wanted_s, self._lease_ttl_s):
            log.warning(
                "lease_ttl_s is %d, but etcd grants leases of %d s, one and a half times its "
                "election timeout: so long does it take to notice that a worker died",
                wanted_s,
                lease.ttl_s,
            )
        self._lease_id, self._lease_ttl_s = lease.lease_id, lease.ttl_s

    def _forget_lease(self) -> None:
        self._lease_id = 0
        with self._lock:
            for own in self._records.values():
                own.revision = 0

    def _look_after(self, client: EtcdClient, own: _OwnRecord, now_s: float) -> None:
        """See that the key holds the record under the lease, or another start's record."""
        own.doubted = False
        before = own.revision
        found = client.get(own.key) if own.lease_id else None
        if found is not None and self._is_right(own, found):
            revision = found.mod_revision
        else:
            own.superseded, own.written_at_s = False, now_s
            revision = self._write(client, own, found)
        with self._lock:
            own.revision = revision
        if revision != before:
            self._on_change()

    def _is_right(self, own: _OwnRecord, found: KeyValue) -> bool:
        if own.is_in(found, self._lease_id):
            own.superseded = False
            return True
        if own.superseded:
            return True  # until the key is gone, it is for the other start to mend
        if own.is_in(found, own.lease_id):
            return False  # of the lease that was lost
        self._overwritten += 1
        other = own.successor_in(found, self._lease_id)
        if other is None:
            log.warning(
                "the record of worker %s was overwritten in etcd (%s); writing it again",
                own.record.peer,
                own.difference(found),
            )
            return False
        log.warning(
            "worker %s was replaced by incarnation %s; not registering %s again",
            own.record.peer,
            other.incarnation,
            own.record.incarnation,
        )
        own.superseded = True
        return True

    def _write(self, client: EtcdClient, own: _OwnRecord, found: KeyValue | None) -> int:
        """Returns the revision; 0 if the key changed meanwhile, so that one has to look again."""
        if not own.lease_id:
            # Whatever an earlier start of this worker left there is overwritten.
            revision: int | None = client.put(own.key, own.value, self._lease_id)
        else:
            expected = 0 if found is None else found.mod_revision
            revision = client.put_if_unchanged(own.key, own.value, self._lease_id, expected)
        if revision is None:
            return 0
        own.lease_id = self._lease_id
        return revision


@dataclass(slots=True)
class _OwnRecord:
    """A record to keep alive.

    Attributes:
        revision: where its key was right; 0 while it has to be looked at.
        lease_id: that it was last written under; 0 if it never was. After that, a successor may
            have replaced it.
        written_at_s: when that was.
        doubted: the key was changed since.
        superseded: another start has taken its place.
    """

    record: WorkerRecord
    key: str
    value: bytes
    revision: int = 0
    lease_id: int = 0
    written_at_s: float = 0.0
    doubted: bool = False
    superseded: bool = False

    def is_in(self, found: KeyValue, lease_id: int) -> bool:
        """Whether the key is as it was written under a lease."""
        return found.value == self.value and found.lease_id == lease_id

    def successor_in(self, found: KeyValue, lease_id: int) -> WorkerRecord | None:
        """Another start's record, if the key holds one.

        Every start keeps its record under a lease of its own, so what has none, or ours, is
        nobody's.
        """
        if found.lease_id in (0, lease_id):
            return None
        try:
            other = decode_record(found.value or b"", key=self.key)
        except ProtocolError:
            return None
        return None if other.incarnation == self.record.incarnation else other

    def difference(self, found: KeyValue) -> str:
        """What is wrong with a value that is not a successor's."""
        if found.value == self.value:
            return "by itself, but not under its lease"
        try:
            other = decode_record(found.value or b"", key=self.key)
        except ProtocolError as error:
            return str(error)
        if other.incarnation != self.record.incarnation:
            return f"incarnation {other.incarnation}, which keeps no lease"
        return f"addresses {', '.join(other.addresses)}"
