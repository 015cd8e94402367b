"""Dead and hung processes."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.chaos.app import ChaosApp, go_on, kill, stop
from tests.support.chaos.fault import OUTAGE_S, Began, Inject
from tests.support.transfers.fault_points import Armed

Victim = Callable[[ChaosApp, Armed], int]
"""The process to strike, while another one (or the same) is held at a fault point."""


def held(ring: ChaosApp, armed: Armed) -> int:
    """The engine that is held itself."""
    return armed.pid


def engine_of_held(ring: ChaosApp, armed: Armed) -> int:
    """The engine of the replica that is held."""
    for engine in ring.processes.engines():
        if engine.ppid() == armed.pid:
            return engine.pid
    raise LookupError(f"replica {armed.pid} has no engine")


def owner(ring: ChaosApp, armed: Armed) -> int:
    """The prefill engine that whoever is held deals with."""
    return ring.pid_of(armed.about)


def kill_at(point: str, victim: Victim) -> Inject:
    """SIGKILL ``victim`` while somebody is held at ``point``, then let that one go on."""

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        armed.wait()
        pid = victim(ring, armed)
        began()
        kill(pid)
        armed.release()

    return inject


def hang_at(point: str, victim: Victim) -> Inject:
    """SIGSTOP ``victim`` while somebody is held at ``point``, for longer than a lease.

    If it is the one that is held, it goes on where it was, too late.
    """

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        armed.wait()
        pid = victim(ring, armed)
        began()
        stop(pid)
        armed.release()
        time.sleep(OUTAGE_S)
        go_on(pid)

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


def hang_engine(side: str) -> Inject:
    """SIGSTOP one engine for longer than a lease, then let it go on."""

    def inject(ring: ChaosApp, began: Began) -> None:
        pid = int(ring.workers(side)[0]["pid"])
        began()
        stop(pid)
        time.sleep(OUTAGE_S)
        go_on(pid)

    return inject
