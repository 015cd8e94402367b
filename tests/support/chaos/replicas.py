"""The life of replicas: asked to end, scaled down, replaced by newer ones, and the ingress lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.support.chaos.app import MODEL, REPLICAS, ChaosApp, kill, stop
from tests.support.chaos.fault import Began, Inject

_SCALED_S = 100.0
_REDEPLOYED_S = 330.0
_BACKOFF_S = 0.05


def terminate_replica(side: str) -> Inject:
    """SIGTERM one replica process, as a node that is shut down does."""

    def inject(ring: ChaosApp, began: Began) -> None:
        began()
        ring.processes.replicas(side)[0].terminate()

    return inject


def hang_replica(side: str) -> Inject:
    """SIGSTOP one replica process for good; its engine runs on. Serve has to replace it."""

    def inject(ring: ChaosApp, began: Began) -> None:
        replica = ring.processes.replicas(side)[0]
        began()
        stop(replica.pid)
        _until(lambda: not replica.is_running(), f"the hung {side} replica is gone", _SCALED_S)

    return inject


def kill_all_decode(ring: ChaosApp, began: Began) -> None:
    """SIGKILL every decode replica: nobody can answer until Serve has replaced one."""
    replicas = ring.processes.replicas("Decode")
    began()
    for replica in replicas:
        replica.kill()


def kill_ingress(ring: ChaosApp, began: Began) -> None:
    """SIGKILL the only ingress replica."""
    (replica,) = ring.processes.replicas("Ingress")
    began()
    replica.kill()


def kill_proxy(ring: ChaosApp, began: Began) -> None:
    """SIGKILL Serve's HTTP proxy."""
    began()
    kill(ring.processes.proxy().pid)


def scale_down(side: str) -> Inject:
    """One replica fewer, which Serve has to drain; then as many as before."""

    def inject(ring: ChaosApp, began: Began) -> None:
        def fewer(document: dict[str, Any]) -> None:
            override = {"name": f"{side}:{MODEL}", "num_replicas": REPLICAS - 1}
            document["applications"][0]["deployments"] = [override]

        def as_before(document: dict[str, Any]) -> None:
            del document["applications"][0]["deployments"]

        began()
        ring.app.deploy(fewer)
        _until(
            lambda: len(ring.processes.replicas(side)) < REPLICAS, f"{side} is smaller", _SCALED_S
        )
        ring.app.deploy(as_before)

    return inject


def redeploy(ring: ChaosApp, began: Began) -> None:
    """Another setting of the router: Serve replaces every replica, one by one."""

    def changed(document: dict[str, Any]) -> None:
        router = document["applications"][0]["args"]["router"]
        router["backoff_s"] = router.get("backoff_s", _BACKOFF_S) + 0.01

    before = [
        one for side in ("Prefill", "Decode", "Ingress") for one in ring.processes.replicas(side)
    ]
    began()
    ring.app.deploy(changed)
    _until(
        lambda: not any(one.is_running() for one in before),
        "every replica is a new one",
        _REDEPLOYED_S,
    )


def _until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so in {timeout_s:.0f} s: {what}")
        time.sleep(0.2)
