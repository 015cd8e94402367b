"""What etcd holds under the prefix, followed change by change. No I/O: listings and changes in."""

from __future__ import annotations

import logging
import math
import threading

from transfer.discovery.listing import KeyValue, Listing
from transfer.discovery.record import decode_record
from transfer.discovery.view import PeerView
from transfer.errors import ProtocolError
from transfer.types import PeerId

log = logging.getLogger(__name__)


class PrefixMirror:
    """Turns listings and watched changes into a :class:`PeerView`.

    Removals are held back for a while after a disturbance. When etcd was away for longer than
    a lease, all leases may be found expired at its return although the workers are alive and
    about to register again; without the hold everybody would lose everybody for a moment.

    A watch that resumes has ``replay_s`` to tell what happened since the last one; then the listing
    made before it counts, whatever the watch told. It may owe us something for ever: up to 3.5.15,
    etcd drops a deletion at the very revision of a compaction and still lets a watch start there
    (etcd-io/etcd#18089). Asking it for progress would not tell: some releases answer before they
    have sent the changes (etcd-io/etcd#15220), others never (etcd-io/etcd#17507).

    The watch thread calls :meth:`begin`, :meth:`apply` and :meth:`forget`; others may be called
    from any thread.
    """

    def __init__(self, view: PeerView, replay_s: float) -> None:
        self._view = view
        self._replay_s = replay_s
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._held: set[PeerId] = set()
        self._settled_at_s = 0.0
        self._listed = False
        # All changes up to this revision are in; 0 before the first listing.
        self._revision = 0
        self._expected: Listing | None = None
        self._replayed_at_s = 0.0

    @property
    def listed(self) -> bool:
        """Whether there has been a listing at all."""
        return self._listed

    def begin(self, listing: Listing, now_s: float) -> int:
        """Take a listing made right before a watch; returns the revision to watch from.

        That is where the last watch broke off, so that each change in between is told. Only if
        there is no such point (first time, compaction, an etcd that lost its data), the
        difference to the listing is told and the watch starts behind it.
        """
        with self._lock:
            if self._continues(listing):
                # Checked against the listing once the changes are in: a history that was
                # replaced can look like a continuation.
                self._expected = listing
                self._replayed_at_s = now_s + self._replay_s
            else:
                self._install(listing, now_s)
            self._listed = True
            return self._revision + 1

    def apply(self, changes: Listing, now_s: float) -> None:
        """Take watched changes, in the order of their revisions.

        Args:
            changes: the changes and the revision that etcd was at when it sent them.
        """
        with self._lock:
            # One revision can have several changes (a lease that ends deletes all its keys), so
            # what is old is decided before the first of them.
            known = self._revision
            for item in changes.items:
                if self._expected is not None and item.mod_revision > self._expected.revision:
                    known = max(known, self._expected.revision)
                    self._install(self._expected, now_s)
                if item.mod_revision > known:
                    self._take(item, now_s)
                    self._revision = max(self._revision, item.mod_revision)
            if (
                self._expected is not None
                and changes.items
                and changes.revision >= self._expected.revision
            ):
                self._install(self._expected, now_s)

    def forget(self) -> None:
        """The history is compacted: start from the next listing."""
        with self._lock:
            self._revision = 0
            self._expected = None

    def disturbed(self, now_s: float, hold_s: float) -> None:
        """Etcd failed, or has just come back: hold removals back for so long."""
        with self._lock:
            self._settled_at_s = now_s + hold_s

    def settle(self, now_s: float) -> float:
        """Do what had to wait until now; returns when to call again, if not sooner."""
        with self._lock:
            if self._expected is not None and now_s >= self._replayed_at_s:
                self._install(self._expected, now_s)
            if self._held and now_s >= self._settled_at_s:
                for peer in self._held:
                    self._view.discard(peer)
                self._held.clear()
            return min(
                math.inf if self._expected is None else self._replayed_at_s,
                self._settled_at_s if self._held else math.inf,
            )

    def _continues(self, listing: Listing) -> bool:
        if not self._revision or listing.revision < self._revision:
            return False
        for item in listing.items:
            entry = self._entries.get(item.key)
            if item.mod_revision <= self._revision and (
                entry is None or entry.mod_revision != item.mod_revision
            ):
                return False
        # At the same revision there is nothing to resume; the listing is the whole truth.
        return listing.revision > self._revision

    def _install(self, listing: Listing, now_s: float) -> None:
        self._expected = None
        present = {item.key for item in listing.items}
        for key in [key for key in self._entries if key not in present]:
            self._remove(key, now_s)
        for item in listing.items:
            entry = self._entries.get(item.key)
            if entry is None or entry.mod_revision != item.mod_revision:
                self._take(item, now_s)
        self._revision = listing.revision

    def _take(self, item: KeyValue, now_s: float) -> None:
        if item.value is None:
            self._remove(item.key, now_s)
            return
        peer = None
        try:
            record = decode_record(item.value, key=item.key)
        except ProtocolError as error:
            log.warning("skipping a worker record: %s", error)
        else:
            peer = record.peer
            self._held.discard(peer)
            self._view.put(record)
        before = self._entries.get(item.key)
        self._entries[item.key] = _Entry(item.mod_revision, peer)
        if before is not None and before.peer is not None and peer is None:
            self._leave(before.peer, now_s)

    def _remove(self, key: str, now_s: float) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.peer is not None:
            self._leave(entry.peer, now_s)

    def _leave(self, peer: PeerId, now_s: float) -> None:
        if now_s < self._settled_at_s:
            self._held.add(peer)
        else:
            self._view.discard(peer)


class _Entry:
    """A key that etcd has; ``peer`` is ``None`` if its record was skipped."""

    __slots__ = ("mod_revision", "peer")

    def __init__(self, mod_revision: int, peer: PeerId | None) -> None:
        self.mod_revision = mod_revision
        self.peer = peer
