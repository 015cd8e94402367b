"""A proxy before servers that answer by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deployments.router.request_state import RetryPolicy
from serve_app.edge.body_limits import BodyLimits
from serve_app.proxy.endpoint import BODY_LIMITS, HEAD_TIMEOUT_S, Proxy, ProxyOptions
from tests.support.scripted.servers import Server, Step
from transfer.discovery.static import StaticDiscovery
from transfer.types import PeerId, WorkerRecord


@dataclass
class Setup:
    """A proxy and its servers."""

    url: str
    client: aiohttp.ClientSession
    prefill: list[Server]
    decode: list[Server]

    async def ask(
        self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any
    ) -> tuple[int, str, aiohttp.ClientResponse]:
        async with self.client.post(
            self.url + path, json={"model": "m", "prompt": "Hi", **body}, headers=headers
        ) as response:
            return response.status, await response.text(), response

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        pytest.fail("the condition did not come true in 10 s")


@asynccontextmanager
async def setup(
    prefill: list[Step],
    decode: list[Step],
    *,
    api_key: str = "",
    discovered: bool = False,
    limits: BodyLimits = BODY_LIMITS,
    head_timeout_s: float = HEAD_TIMEOUT_S,
    allowed_origins: tuple[str, ...] = (),
) -> AsyncIterator[Setup]:
    servers = [Server(step) for step in (*prefill, *decode)]
    running: list[TestServer] = []
    for server in servers:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.answer)
        stand_in = TestServer(app)
        await stand_in.start_server()  # cancels handlers of clients that leave
        server.url = str(stand_in.make_url("")).rstrip("/")
        running.append(stand_in)
    ours, theirs = servers[: len(prefill)], servers[len(prefill) :]
    records = [
        WorkerRecord(
            PeerId(f"e{number}", 0),
            incarnation="i",
            role="kv_producer" if server in ours else "kv_consumer",
            tp_size=1,
            addresses=("tcp://127.0.0.1:9",),
            layout_hash="l",
            started_at_s=0.0,
            http_url=server.url,
        )
        for number, server in enumerate(servers)
    ]
    named = ([], []) if discovered else (ours, theirs)
    options = ProxyOptions(
        {
            "prefill": tuple(server.url for server in named[0]),
            "decode": tuple(server.url for server in named[1]),
        },
        StaticDiscovery(records) if discovered else None,
        api_key,
        RetryPolicy(attempts=3, backoff_s=0.0),
        limits,
        allowed_origins,
    )
    proxy = TestServer(Proxy(options).application())
    # Cancels handlers of clients that leave.
    await proxy.start_server(keepalive_timeout=head_timeout_s)
    try:
        async with aiohttp.ClientSession() as client:
            yield Setup(str(proxy.make_url("")).rstrip("/"), client, ours, theirs)
    finally:
        for stand_in in (proxy, *running):
            await stand_in.close()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)
