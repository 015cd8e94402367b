"""What the endpoint tells those who watch it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from deployments.callers.replica_caller import ReplicaCaller
from deployments.errors import NoReplica, ReplicaLost
from deployments.replicas.health import TransferUnhealthy
from serve_app.ingress.metrics import SCRAPE_KEPT_S
from tests.support.scripted.handles import FakeHandle, answers, fails
from tests.support.scripted.ingress import Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    return Endpoint(monkeypatch)


# ---- health --------------------------------------------------------------------------------------


def test_health_asks_both_sides(endpoint: Endpoint) -> None:
    response = endpoint.ask("GET", "/health")

    assert response.status_code == 200
    assert response.json() == {"status": "ok", "prefill": "ok", "decode": "ok"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoReplica("decode", 5.0), "no decode replica took the request within 5.0 s"),
        (ReplicaLost("decode", "d1", "it died"), "decode replica d1 was lost: it died"),
        (TimeoutError(), "no decode replica answered within 1 s"),
    ],
)
def test_health_says_which_side_is_missing(endpoint: Endpoint, error: Exception, said: str) -> None:
    endpoint.caller.not_ready = {"decode": error}

    response = endpoint.ask("GET", "/health")

    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "prefill": "ok", "decode": said}


def test_health_says_which_transfer_engine_is_down(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: Any = [
        FakeHandle({"p1": fails(TransferUnhealthy("the transfer engine of rank 0 of e is down"))}),
        FakeHandle({"d1": answers("d1")}),
    ]
    caller = ReplicaCaller(*handles, pick_timeout_s=1.0)
    monkeypatch.setattr(endpoint.caller, "ready", caller.ready)

    response = endpoint.ask("GET", "/health")

    assert response.status_code == 503
    assert response.json() == {
        "status": "unavailable",
        "prefill": "prefill replica p1 was lost: it is not well: "
        "the transfer engine of rank 0 of e is down",
        "decode": "ok",
    }


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_are_gathered_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = 0

    async def gather() -> str:
        nonlocal gathered
        gathered += 1
        text = f"metrics {gathered}"
        await asyncio.sleep(0.05)
        return text

    monkeypatch.setattr("serve_app.ingress.endpoint.scrape", gather)
    endpoint = Endpoint(monkeypatch)

    async def main() -> None:
        transport = httpx.ASGITransport(endpoint.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            told = await asyncio.gather(*(client.get("/metrics") for _ in range(64)))
            assert {(answer.status_code, answer.text) for answer in told} == {(200, "metrics 1")}
            assert (await client.get("/metrics")).text == "metrics 1"
            await asyncio.sleep(SCRAPE_KEPT_S)
            assert (await client.get("/metrics")).text == "metrics 2"

    asyncio.run(main())
