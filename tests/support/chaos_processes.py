"""Dead and hung processes."""

from __future__ import annotations

import time

from tests.support.chaos_app import ChaosApp, go_on, kill, stop
from tests.support.chaos_fault import OUTAGE_S, Began, Inject


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


def hang_engine(side: str, hung_s: float = OUTAGE_S) -> Inject:
    """SIGSTOP one engine for longer than a lease, then let it go on."""

    def inject(ring: ChaosApp, began: Began) -> None:
        pid = int(ring.workers(side)[0]["pid"])
        began()
        stop(pid)
        time.sleep(hung_s)
        go_on(pid)

    return inject


def hang_owner(point: str, hung_s: float = OUTAGE_S) -> Inject:
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


def hang_held_engine(point: str, hung_s: float = OUTAGE_S) -> Inject:
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
