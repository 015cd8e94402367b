"""Bad links between prefill and decode, and an etcd that is away or forgets."""

from __future__ import annotations

import time

import grpc
import pyetcd

from tests.support.chaos.app import LEASE_TTL_S, ChaosApp
from tests.support.chaos.fault import OUTAGE_S, Began, Inject
from tests.support.network.link_relays import Link

_ELECTED_WITHIN_S = 20.0


def link(
    state: Link, bytes_per_s: float | None = None, point: str = "", *, newest_only: bool = False
) -> Inject:
    """Change all links between prefill and decode for a while; etcd sees both sides.

    With ``newest_only``, those to the prefill worker that was started last.
    """

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point) if point else None
        if armed is not None:
            armed.wait()
        began()
        ring.relays.set(state, bytes_per_s, newest_only=newest_only)
        if armed is not None:
            armed.release()
        time.sleep(OUTAGE_S)
        ring.relays.set(Link.OPEN)

    return inject


def links_damage(ring: ChaosApp, began: Began) -> None:
    """All links turn bits over in the blocks that pass, and TCP notices nothing."""
    before = ring.app.totals("decode").get("reader_corrupted", 0)
    began()
    ring.relays.set(Link.OPEN, corrupt=True)
    time.sleep(OUTAGE_S)
    ring.relays.set(Link.OPEN)
    if ring.app.totals("decode").get("reader_corrupted", 0) == before:
        raise RuntimeError("nothing arrived changed, or nobody saw it")


def etcd_killed(ring: ChaosApp, began: Began) -> None:
    """All members die and come back on their data."""
    began()
    ring.etcd.kill()
    time.sleep(OUTAGE_S)
    ring.etcd.start()


def etcd_paused(ring: ChaosApp, began: Began) -> None:
    """All members hang: connections stay open, nothing is answered, leases run out."""
    began()
    ring.etcd.pause()
    time.sleep(OUTAGE_S)
    ring.etcd.resume()


def etcd_member_lost(ring: ChaosApp, began: Began) -> None:
    """One of three is gone for a while."""
    began()
    ring.etcd.members[0].kill()
    time.sleep(OUTAGE_S)
    ring.etcd.launch(0)
    ring.etcd.members[0].wait()


def etcd_compacted(ring: ChaosApp, began: Began) -> None:
    """The history goes while a member, and the watches on it, are cut."""
    began()
    ring.etcd.members[1].kill()
    _compact(ring.etcd.members[0].endpoint)
    ring.etcd.launch(1)
    ring.etcd.members[1].wait()
    time.sleep(2.0)


def _compact(endpoint: str) -> None:
    """Forget the history, as soon as the members have a leader again if they lost it just now."""
    host, _, port = endpoint.partition(":")
    deadline = time.monotonic() + _ELECTED_WITHIN_S
    while True:
        try:
            # A client gives an endpoint up for good after one failure.
            with pyetcd.client(host=host, port=int(port), timeout=2) as client:
                revision = client.put("/unrelated", b"x").header.revision
                client.compact(revision, physical=True)
            return
        except (grpc.RpcError, pyetcd.exceptions.Etcd3Exception):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
    time.sleep(OUTAGE_S)
    ring.etcd.start()
    known = {worker["engine_id"] for worker in ring.workers("prefill")}
    ring.wait_complete()
    _until_read_from(ring, known)


def _until_read_from(ring: ChaosApp, known: set[str]) -> None:
    """Until decode has read from a prefill worker that was not there before: one lease at most."""
    deadline = time.monotonic() + LEASE_TTL_S
    while True:
        owners = {owner for worker in ring.workers("decode") for owner in worker["reads_by_owner"]}
        present = {worker["engine_id"] for worker in ring.workers("prefill")}
        if (present - known) & owners:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody reads from the new one of {present}")
        time.sleep(0.2)
