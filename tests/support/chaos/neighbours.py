"""Clients and neighbours that mean no good or know no better, and clocks that are set."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pyetcd

from tests.support.chaos.app import LEASE_TTL_S, ChaosApp
from tests.support.chaos.fault import OUTAGE_S, Began, Inject
from tests.support.network.link_relays import Link
from tests.support.network.meddling_relay import MeddlingRelay, greet_only
from tests.support.network.strangers import strangers
from transfer.discovery.record import workers_prefix
from transfer.transports.tcp.places import MAX_STRANGERS

_SLOW_BODIES = 64
_SCRAPES, _SCRAPES_AT_ONCE = 300, 64
_STRANGERS = MAX_STRANGERS + 8
_SET_BACK_S = -3600.0


def clock_set_back(ring: ChaosApp, began: Began) -> None:
    """Every process's wall clock goes back by an hour, and forward again."""
    began()
    ring.world.set_clock(_SET_BACK_S)
    time.sleep(OUTAGE_S)
    ring.world.set_clock(0.0)


def slow_bodies(ring: ChaosApp, began: Began) -> None:
    """Clients that send half of a request and then nothing."""
    half = b'POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-length: 500\r\n\r\n{"model": '
    with ExitStack() as clients:
        began()
        for _ in range(_SLOW_BODIES):
            client = socket.create_connection(("127.0.0.1", ring.app.port), timeout=5)
            clients.enter_context(client).sendall(half)
        time.sleep(OUTAGE_S)


def metrics_flood(ring: ChaosApp, began: Began) -> None:
    """Very many scrapes, as of somebody who has no key."""

    def scrape(_: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", ring.app.port, timeout=60)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    began()
    with ThreadPoolExecutor(_SCRAPES_AT_ONCE) as pool:
        statuses = set(pool.map(scrape, range(_SCRAPES)))
    if statuses != {200}:
        raise RuntimeError(f"scrapes ended with {statuses}")


def silent_strangers(ring: ChaosApp, began: Began) -> None:
    """Connections to every prefill worker that say nothing, more than it has places for them."""
    with ExitStack() as everywhere:
        began()
        for address in _addresses(ring):
            everywhere.enter_context(strangers(address, _STRANGERS))
        time.sleep(OUTAGE_S)


def rogue_owners(ring: ChaosApp, began: Began) -> None:
    """Something at every prefill worker's address greets as the true one does, and then answers
    reads and confirms them by itself."""
    with ExitStack() as everywhere:
        rogues = {
            address: everywhere.enter_context(MeddlingRelay(address, greet_only))
            for address in _addresses(ring)
        }
        began()
        for address, rogue in rogues.items():
            ring.relays.put_before(address, rogue.address)
        # Those who are connected to the true ones have to come again.
        ring.relays.set(Link.REFUSED)
        time.sleep(OUTAGE_S)
        for address in rogues:
            ring.relays.put_before(address)
        ring.relays.set(Link.OPEN)
    if not all(rogue.messages for rogue in rogues.values()):
        raise RuntimeError("nobody came to an owner's address")


def record_overwritten(value: bytes) -> Inject:
    """Somebody writes over the records of all prefill workers; each is right again in a lease."""

    def inject(ring: ChaosApp, began: Began) -> None:
        before = _records(ring)
        with _client(ring) as client:
            began()
            for key in before:
                client.put(key, value)
        deadline = time.monotonic() + 2 * LEASE_TTL_S
        while (now := _records(ring)) != before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the records are {now}")
            time.sleep(0.2)
        began.over()

    return inject


def _records(ring: ChaosApp) -> dict[str, bytes]:
    """The records of prefill workers, by key; whatever stands there now."""
    engines = {worker["engine_id"] for worker in ring.workers("prefill")}
    with _client(ring) as client:
        return {
            meta.key.decode(): value
            for value, meta in client.get_prefix(workers_prefix("chaos"))
            if any(engine_id in meta.key.decode() for engine_id in engines)
        }


def _addresses(ring: ChaosApp) -> list[str]:
    """Where readers look for the prefill workers."""
    return [str(json.loads(record)["addresses"][0]) for record in _records(ring).values()]


def _client(ring: ChaosApp) -> pyetcd.Etcd3Client:
    host, _, port = ring.etcd.endpoints[0].partition(":")
    return pyetcd.client(host=host, port=int(port), timeout=2)
