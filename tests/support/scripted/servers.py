"""Stand-ins for vLLM's OpenAI servers, each of which answers by a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.scripted.tickets import make_ticket

TICKET = make_ticket().to_params()
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
    is_dead: bool = False
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


def dies_of(prompt: str, otherwise: Step) -> Step:
    """Its engine dies of prompts that begin so, and answers nobody any more."""

    async def step(server: Server, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            server.is_dead |= (await request.json())["prompt"].startswith(prompt)
        return await (dead if server.is_dead else otherwise)(server, request)

    return step


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


async def new_ticket(server: Server, request: web.Request) -> web.StreamResponse:
    """A prefill server that gives out tickets of different hand-offs."""
    made = make_ticket(handoff_id=f"{len(server.bodies):032x}").to_params()
    return web.json_response({"kv_transfer_params": made, "choices": []})


async def completes(server: Server, request: web.Request) -> web.StreamResponse:
    """Answers with the prompt, for every sample; streamed if that is asked for."""
    body = await request.json()
    choices = [
        {"index": index, "text": f"{body['prompt']}", "finish_reason": "stop"}
        for index in range(body.get("n") or 1)
    ]
    content = {"id": f"cmpl-{body['request_id']}", "created": 7}
    if not body.get("stream"):
        return web.json_response({**content, "choices": choices})
    events = [f"data: {json.dumps({**content, 'choices': [choice]})}\n\n" for choice in choices]
    return await streams(*(event.encode() for event in (*events, DONE)))(server, request)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, without its end."""
    return [
        json.loads(event.removeprefix("data: "))
        for event in text.split("\n\n")
        if event and event + "\n\n" != DONE
    ]


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
