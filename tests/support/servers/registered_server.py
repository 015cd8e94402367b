"""A stand-in for a vLLM server that etcd knows.

In a process of its own: ``python -m tests.support.servers.registered_server``.

Prints its URL, then serves until its standard input ends, and takes its record back. Its tickets
name it, and its answers name the engine whose ticket they were asked with.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from tests.support.processes.reporting_process import report, reporting_process
from tests.support.scripted.tickets import make_ticket
from transfer.discovery import make_discovery
from transfer.types import PeerId, WorkerRecord


@contextmanager
def registered_server(endpoint: str, engine_id: str, role: str) -> Iterator[subprocess.Popen[str]]:
    """A running server; killed at the end, if it did not end before.

    Args:
        endpoint: etcd's.
        role: ``kv_producer`` or ``kv_consumer``.
    """
    with reporting_process(
        "tests.support.servers.registered_server", endpoint, engine_id, role
    ) as (
        process,
        _,
    ):
        yield process


def leave(process: subprocess.Popen[str]) -> None:
    """Has a server take its record back and end; returns once it has."""
    assert process.stdin is not None
    process.stdin.close()
    if process.wait(10):
        raise RuntimeError(f"the server ended with {process.returncode}")


async def _serve(endpoint: str, engine_id: str, role: str) -> None:
    async def healthy(request: web.Request) -> web.Response:
        return web.Response()

    async def answer(request: web.Request) -> web.Response:
        if role == "kv_producer":
            ticket = make_ticket(engine_id=engine_id, handoff_id=uuid.uuid4().hex)
            return web.json_response({"kv_transfer_params": ticket.to_params(), "choices": []})
        params = (await request.json()).get("kv_transfer_params") or {}
        return web.json_response({"choices": [{"text": params.get("remote_engine_id", "nobody")}]})

    app = web.Application()
    app.router.add_get("/health", healthy)
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    record = WorkerRecord(
        PeerId(engine_id, 0),
        incarnation="i",
        role=role,
        tp_size=1,
        addresses=("tcp://127.0.0.1:9",),
        layout_hash="l",
        started_at_s=0.0,
        http_url=url,
    )
    with make_discovery({"kind": "etcd", "endpoints": [endpoint]}) as discovery:
        discovery.publish(record)
        discovery.ready(10)
        await asyncio.to_thread(report, {"url": url})
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
