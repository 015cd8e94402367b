"""The faults of the chaos suite, each as a function that injects it and takes it back.

``began`` is called at the moment of the fault: recovery is counted from there.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyetcd

from tests.support.chaos_app import LEASE_TTL_S, MODEL, REPLICAS, ChaosApp, go_on, kill, stop
from tests.support.link_relays import Link


class Began:
    """When a fault began, which its injection tells by calling this, and was seen to be over."""

    def __init__(self) -> None:
        self.at_s = time.monotonic()
        self.over_at_s: float | None = None

    def __call__(self) -> None:
        self.at_s = time.monotonic()

    def over(self) -> None:
        self.over_at_s = time.monotonic()


Inject = Callable[[ChaosApp, Began], None]

_OUTAGE_S = 8.0
_FREED_WITHIN_S = 1.0
_FREED_BY_READER_S = 6.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table.

    Attributes:
        what: the fault.
        phase: where requests are when it happens.
        inject: does it, and heals what does not heal by itself.
        quick: in the subset that `make test` runs.
    """

    what: str
    phase: str
    inject: Inject
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.what}, {self.phase}".replace(" ", "-")


# ---- dead and hung processes ------------------------------------------------------------------


def kill_held_engine(point: str) -> Inject:
    """SIGKILL the engine that is held at ``point``."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        pid = armed.wait()
        began()
        kill(pid)
        armed.release()

    return inject


def kill_engine_of_held_replica(point: str) -> Inject:
    """SIGKILL the engine of the replica that is held at ``point``, then let the replica go on."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        replica = armed.wait()
        began()
        for engine in ring.processes.engines():
            if engine.ppid() == replica:
                kill(engine.pid)
        armed.release()

    return inject


def kill_owner(point: str) -> Inject:
    """SIGKILL the prefill engine that whoever is held at ``point`` deals with."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        armed.wait()
        pid = ring.pid_of(armed.about)
        began()
        kill(pid)
        armed.release()

    return inject


def kill_replica(side: str) -> Inject:
    """SIGKILL one replica process; its engine must follow."""

    def inject(ring: ChaosApp, began: Began) -> None:
        began()
        ring.processes.replicas(side)[0].kill()

    return inject


def kill_one_engine(side: str) -> Inject:
    """SIGKILL one engine, whatever it is doing."""

    def inject(ring: ChaosApp, began: Began) -> None:
        pid = int(ring.workers(side)[0]["pid"])
        began()
        kill(pid)

    return inject


def kill_all_prefill(ring: ChaosApp, began: Began) -> None:
    """SIGKILL every prefill replica: decode is alone."""
    replicas = ring.processes.replicas("Prefill")
    began()
    for replica in replicas:
        replica.kill()


def hang_engine(side: str, hung_s: float = _OUTAGE_S) -> Inject:
    """SIGSTOP one engine for longer than a lease, then let it go on."""

    def inject(ring: ChaosApp, began: Began) -> None:
        pid = int(ring.workers(side)[0]["pid"])
        began()
        stop(pid)
        time.sleep(hung_s)
        go_on(pid)

    return inject


def hang_owner(point: str, hung_s: float = _OUTAGE_S) -> Inject:
    """SIGSTOP the prefill engine that whoever is held at ``point`` deals with."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        armed.wait()
        pid = ring.pid_of(armed.about)
        began()
        stop(pid)
        armed.release()
        time.sleep(hung_s)
        go_on(pid)

    return inject


def hang_held_engine(point: str, hung_s: float = _OUTAGE_S) -> Inject:
    """SIGSTOP the engine that is held at ``point``: it goes on where it was, too late."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        pid = armed.wait()
        began()
        stop(pid)
        armed.release()
        time.sleep(hung_s)
        go_on(pid)

    return inject


# ---- links ------------------------------------------------------------------------------------


def link(state: Link, bytes_per_s: float | None = None, point: str = "") -> Inject:
    """Change all links between prefill and decode for a while; etcd sees both sides."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point) if point else None
        if armed is not None:
            armed.wait()
        began()
        ring.relays.set(state, bytes_per_s)
        if armed is not None:
            armed.release()
        time.sleep(_OUTAGE_S)
        ring.relays.set(Link.OPEN)

    return inject


# ---- etcd -------------------------------------------------------------------------------------


def etcd_killed(ring: ChaosApp, began: Began) -> None:
    """All members die and come back on their data."""
    began()
    ring.etcd.kill()
    time.sleep(_OUTAGE_S)
    ring.etcd.start()


def etcd_paused(ring: ChaosApp, began: Began) -> None:
    """All members hang: connections stay open, nothing is answered, leases run out."""
    began()
    ring.etcd.pause()
    time.sleep(_OUTAGE_S)
    ring.etcd.resume()


def etcd_member_lost(ring: ChaosApp, began: Began) -> None:
    """One of three is gone for a while."""
    began()
    ring.etcd.members[0].kill()
    time.sleep(_OUTAGE_S)
    ring.etcd.launch(0)
    ring.etcd.members[0].wait()


def etcd_compacted(ring: ChaosApp, began: Began) -> None:
    """The history goes while a member, and the watches on it, are cut."""
    began()
    ring.etcd.members[1].kill()
    host, _, port = ring.etcd.members[0].endpoint.partition(":")
    with pyetcd.client(host=host, port=int(port), timeout=5) as client:
        revision = client.put("/unrelated", b"x").header.revision
        client.compact(revision, physical=True)
    ring.etcd.launch(1)
    ring.etcd.members[1].wait()
    time.sleep(2.0)


def lease_lost(ring: ChaosApp, began: Began) -> None:
    """A worker does not renew its lease for so long that it is gone, and comes back."""
    armed = ring.points.arm("discovery.lease")
    armed.wait()
    began()
    time.sleep(2.0 * LEASE_TTL_S)
    armed.release()
    time.sleep(1.0)


def new_replica_without_etcd(ring: ChaosApp, began: Began) -> None:
    """A prefill replica dies while etcd is away: its successor is seen once etcd is back."""
    began()
    ring.etcd.kill()
    ring.processes.replicas("Prefill")[0].kill()
    time.sleep(_OUTAGE_S)
    ring.etcd.start()
    known = {worker["engine_id"] for worker in ring.workers("prefill")}
    ring.wait_complete()
    _until_read_from(ring, known)


def _until_read_from(ring: ChaosApp, known: set[str]) -> None:
    """Until decode has read from a prefill worker that was not there before."""
    deadline = time.monotonic() + 4.0 * LEASE_TTL_S
    while True:
        owners = {owner for worker in ring.workers("decode") for owner in worker["reads_by_owner"]}
        present = {worker["engine_id"] for worker in ring.workers("prefill")}
        if (present - known) & owners:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody reads from the new one of {present}")
        time.sleep(0.2)


# ---- clients ----------------------------------------------------------------------------------


def client_leaves(point: str) -> Inject:
    """A client goes away while its request is held at ``point``; everything is free at once.

    It is the only client then: others would hide what it leaves behind.
    """

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        connection = _ask_and_leave_open(ring)
        armed.wait()
        began()
        connection.close()
        time.sleep(0.3)
        armed.release()
        # A read that was under way is over when its own thread noticed.
        within = _FREED_BY_READER_S if point.startswith("reader") else _FREED_WITHIN_S
        _until_free(ring, began, within)

    return inject


def client_leaves_while_decoding(ring: ChaosApp, began: Began) -> None:
    """A client goes away after the first tokens."""
    connection = _ask_and_leave_open(ring)
    response = connection.getresponse()
    response.readline()
    began()
    connection.close()
    response.close()
    _until_free(ring, began, _FREED_WITHIN_S)


def _ask_and_leave_open(ring: ChaosApp) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", ring.app.port, timeout=30)
    body = {
        "model": MODEL,
        "prompt": list(ring.questions[-1].prompt),
        "max_tokens": 100,
        "min_tokens": 100,
        "stream": True,
    }
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    return connection


def _until_free(ring: ChaosApp, began: Began, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while held := ring.busy():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not free within {within_s} s: {held}")
        time.sleep(0.05)
    began.over()
    # A request that nobody cancelled would begin only now to be busy.
    time.sleep(0.5)
    if held := ring.busy():
        raise RuntimeError(f"busy again: {held}")


KILLED = "prefill engine killed"
DECODE_KILLED = "decode engine killed"
LEFT = "client leaves"

FAULTS = [
    Fault(KILLED, "before it computes", kill_engine_of_held_replica("prefill.computing")),
    Fault(
        KILLED, "before its answer", kill_engine_of_held_replica("prefill.answering"), quick=True
    ),
    Fault(KILLED, "ticket at the router", kill_owner("router.ticket")),
    Fault(KILLED, "before the read", kill_owner("reader.connecting")),
    Fault(KILLED, "while it sends", kill_held_engine("owner.sending"), quick=True),
    Fault(KILLED, "before it confirms", kill_owner("reader.confirming")),
    Fault("prefill replica killed", "at any time", kill_replica("Prefill")),
    Fault("all prefill replicas killed", "at any time", kill_all_prefill),
    Fault(DECODE_KILLED, "before its read", kill_engine_of_held_replica("decode.accepted")),
    Fault(DECODE_KILLED, "while it reads", kill_held_engine("reader.reading")),
    Fault(DECODE_KILLED, "before it is confirmed", kill_held_engine("reader.confirming")),
    Fault(DECODE_KILLED, "streams under way", kill_one_engine("decode"), quick=True),
    Fault("decode replica killed", "streams under way", kill_replica("Decode")),
    Fault("prefill engine hangs 8 s", "before the read", hang_owner("reader.connecting")),
    Fault("prefill engine hangs 8 s", "while it is read", hang_owner("reader.reading"), quick=True),
    Fault("prefill engine hangs 8 s", "before it confirms", hang_owner("reader.confirming")),
    Fault("decode engine hangs 8 s", "while it reads", hang_held_engine("reader.reading")),
    Fault(
        "decode engine hangs 8 s", "before it is confirmed", hang_held_engine("reader.confirming")
    ),
    Fault("decode engine hangs 8 s", "while it decodes", hang_engine("decode")),
    Fault(
        "links silent 8 s",
        "while blocks move",
        link(Link.SILENT, point="owner.sending"),
        quick=True,
    ),
    Fault("links silent 8 s", "before confirmation", link(Link.SILENT, point="reader.confirming")),
    Fault("links refused 8 s", "at any time", link(Link.REFUSED)),
    Fault("links at 50 kB a second for 8 s", "at any time", link(Link.OPEN, 50e3)),
    Fault("etcd killed for 8 s", "at any time", etcd_killed, quick=True),
    Fault("etcd paused for 8 s", "at any time", etcd_paused),
    Fault("one of three etcd members lost", "at any time", etcd_member_lost),
    Fault("etcd compacted under watches", "at any time", etcd_compacted),
    Fault("a worker's lease lost and regained", "at any time", lease_lost, quick=True),
    Fault("etcd away, prefill replica killed", "at any time", new_replica_without_etcd),
]

LEAVING = [
    Fault(LEFT, "queued at prefill", client_leaves("prefill.computing"), quick=True),
    Fault(LEFT, "prefill done", client_leaves("prefill.answering"), quick=True),
    Fault(LEFT, "ticket at the router", client_leaves("router.ticket"), quick=True),
    Fault(LEFT, "queued at decode", client_leaves("decode.accepted"), quick=True),
    Fault(LEFT, "before the read", client_leaves("reader.connecting"), quick=True),
    Fault(LEFT, "reading", client_leaves("reader.reading"), quick=True),
    Fault(LEFT, "waiting for confirmation", client_leaves("reader.confirming"), quick=True),
    Fault(LEFT, "decoding", client_leaves_while_decoding, quick=True),
]
"""Injected without other load."""

__all__ = ["FAULTS", "LEAVING", "REPLICAS", "Fault"]
