"""What tests of discovery with a real etcd do to it, and what they hear."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import pyetcd

from tests.support.servers.etcd_server import EtcdServer
from transfer.discovery.base import Discovery, PeerEvent, PeerEventKind
from transfer.types import WorkerRecord

TTL_S = 2
"""Lease time of the sessions that the fixture ``session`` makes."""

Session: TypeAlias = Callable[..., Discovery]
"""The fixture: makes a discovery on a server, with more keys of its configuration by name."""


class Heard:
    """The events of one session, in order."""

    def __init__(self, discovery: Discovery) -> None:
        self.events: list[PeerEvent] = []
        discovery.subscribe(self.events.append)

    def of(self, record: WorkerRecord) -> list[PeerEventKind]:
        return [event.kind for event in self.events if event.record.peer == record.peer]


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Wait until it holds; returns the seconds it took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - start_s


def admin(server: EtcdServer, **arguments: Any) -> Any:
    """A bare client, to do from outside what discovery would not do."""
    host, port = server.endpoint.split(":")
    return pyetcd.client(host=host, port=int(port), timeout=5, **arguments)
