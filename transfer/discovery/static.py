"""Discovery from a list in the configuration, for set-ups without etcd."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from transfer.discovery.base import Discovery, Listener
from transfer.discovery.record import check_record
from transfer.discovery.view import PeerView
from transfer.errors import ConfigurationError, Phase, TransferCancelled
from transfer.types import PeerId, WorkerRecord

ANY_ENGINE = "*"
"""As ``engine_id`` in the list: whatever engine is asked for and has no entry of its own."""


class StaticDiscovery(Discovery):
    """The peers are those of a list, for ever.

    Nobody else hears what is published here: it only joins the local view. Records of the list
    leave ``incarnation`` and ``layout_hash`` empty; the handshake tells them. It also tells the
    engine's id, so that one listed as ``*`` is only taken for who it is.

    Raises:
        ConfigurationError: a record is wrong, or a peer is listed twice.
    """

    def __init__(self, records: Iterable[WorkerRecord]) -> None:
        self._view = PeerView()
        self._lock = threading.Lock()
        self._listed: dict[PeerId, WorkerRecord] = {}
        self._own: set[PeerId] = set()
        self._closed = False
        for record in records:
            check_record(record)
            if record.peer in self._listed:
                raise ConfigurationError(
                    "listed twice in the static peers", phase=Phase.DISCOVER, peer=str(record.peer)
                )
            self._listed[record.peer] = record
            self._view.put(record)

    def __repr__(self) -> str:
        return f"<StaticDiscovery {len(self._listed)} listed, {len(self._own)} own>"

    def publish(self, record: WorkerRecord) -> None:
        check_record(record)
        with self._lock:
            if self._closed:
                raise TransferCancelled("discovery is closed", phase=Phase.DISCOVER)
            self._own.add(record.peer)
            self._view.put(record)

    def withdraw(self, peer: PeerId) -> None:
        with self._lock:
            if peer in self._own:
                self._own.remove(peer)
                listed = self._listed.get(peer)
                if listed is None:
                    self._view.discard(peer)
                else:
                    self._view.put(listed)

    def lookup(self, peer: PeerId) -> WorkerRecord | None:
        return self._view.get(peer) or self._as_any_engine(peer)

    def wait_for(self, peer: PeerId, timeout_s: float) -> WorkerRecord:
        found = self.lookup(peer)
        return found or self._view.wait_for(peer, timeout_s, "the static list of peers")

    def peers(self) -> tuple[WorkerRecord, ...]:
        return self._view.all()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        return self._view.subscribe(listener)

    def ready(self, timeout_s: float) -> None:
        if self._closed:
            raise TransferCancelled("discovery is closed", phase=Phase.DISCOVER)

    @property
    def healthy(self) -> bool:
        return not self._closed

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._view.close()

    def _as_any_engine(self, peer: PeerId) -> WorkerRecord | None:
        record = self._listed.get(PeerId(ANY_ENGINE, peer.rank))
        return None if record is None else replace(record, peer=peer)
