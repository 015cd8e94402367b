"""Stand-ins for vLLM's OpenAI servers, each of which answers by a script."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TICKET = {"handoff_id": "h1", "remote_engine_id": "p", "readers": 1}
EVENTS = [
    'data: {"choices": [{"text": "é"}]}\n\n',
    'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n',
    'data: {"choices": []}\n\n',
]
DONE = "data: [DONE]\n\n"
Step = Callable[["Server", web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Server:
    """One stand-in for a vLLM server: what it was asked, and what it does."""

    step: Step
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    working: int = 0
    left: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        self.headers.append(request.headers)
        if request.method == "POST":
            self.bodies.append(await request.json())
        self.working += 1
        try:
            return await self.step(self, request)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.working -= 1


async def dead(server: Server, request: web.Request) -> web.StreamResponse:
    """What vLLM says when its engine is gone."""
    status = 500 if request.method == "POST" else 503
    return web.json_response({"error": {"message": "EngineDeadError"}}, status=status)


async def stumbles(server: Server, request: web.Request) -> web.StreamResponse:
    """Cannot serve this request, but others."""
    status = 500 if request.method == "POST" else 200
    return web.json_response({"error": {"message": "engine"}}, status=status)


def says(status: int = 200, **document: Any) -> Step:
    async def step(server: Server, request: web.Request) -> web.StreamResponse:
        return web.json_response(document, status=status, headers={"Retry-After": "7"})

    return step


def ticket(server_ticket: Any = TICKET) -> Step:
    return says(kv_transfer_params=server_ticket, choices=[])


def streams(*pieces: bytes, cut: bool = False) -> Step:
    async def step(server: Server, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        if cut and request.transport is not None:
            request.transport.abort()
        return response

    return step


async def hangs(server: Server, request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody came to cancel this")


async def streams_for_ever(server: Server, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    while True:
        await response.write(EVENTS[0].encode())
        await asyncio.sleep(0.01)


async def empty(server: Server, request: web.Request) -> web.StreamResponse:
    return web.Response(content_type="application/json")
