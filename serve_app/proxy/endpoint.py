"""``baton proxy``: OpenAI's completions and chat over stock vLLM servers, without Ray."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from aiohttp import web

from deployments.callers.http_body import PATHS, JsonBody, answers
from deployments.callers.http_caller import HttpCaller
from deployments.callers.http_servers import HttpServers
from deployments.callers.prefill_body import not_clamped
from deployments.callers.ticket_notices import TicketNotices
from deployments.errors import ServiceUnavailable
from deployments.role import ROLES, Role
from deployments.router.coordinator import Coordinator
from deployments.router.request_state import RetryPolicy
from deployments.streams.answer import Refusal, WholeAnswer
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import GenerationRequest, Method
from serve_app.edge.body_limits import Bodies, Body, BodyLimits, BodyRefused
from serve_app.edge.bypass import bypass_reason
from serve_app.edge.cross_origin import CrossOrigin
from serve_app.edge.error_body import error_body
from serve_app.edge.lax_fields import as_read
from serve_app.edge.request_edge import (
    PRIORITY_HEADER,
    Fault,
    answers_fault,
    body_fault,
    copies_fault,
    header_fault,
)
from serve_app.edge.sse import as_events
from transfer.discovery.base import Discovery
from transfer.settings import TransferSettings

BODY_LIMITS: Final = BodyLimits(
    max_body_bytes=16 << 20, max_bytes_in_flight=256 << 20, timeout_s=60.0
)
MAX_ANSWERS: Final = 1024
"""Prompts times samples of one request; each prompt is a request to a prefill server."""
HEAD_TIMEOUT_S: Final = 75.0
"""A connection ends that has brought no whole head of a request for so long, be it idle or slow.

Longer than what stands in front of servers keeps its idle connections, 60 s with most.
"""
STOP_TIMEOUT_S: Final = 10.0
_CONNECT_TIMEOUT_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 5.0
# vLLM closes connections that were idle for 5 s; a request must not meet that on its way.
_IDLE_S: Final = 2.0
_PASSED_ON: Final = ("Authorization", "traceparent", "tracestate", PRIORITY_HEADER)

# A server whose machine is gone says nothing; the kernel asks it after 5 s of silence.
_KEEP_ALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What a proxy does.

    Attributes:
        servers: URLs by role, without a slash at their end; a role that names none is found
            through ``discovery``.
        discovery: finds servers, and owners of tickets that will not be read; not closed here.
        api_key: sent to servers when the client sends none; empty: nothing is sent then.
        policy: retry budget of every request.
        limits: of clients' bodies.
        allowed_origins: whose pages may call from a browser; ``*`` is all of them.
        transfer: how owners are talked to; their TLS, if they have it.
    """

    servers: Mapping[Role, tuple[str, ...]]
    discovery: Discovery | None = None
    api_key: str = field(default="", repr=False)
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    limits: BodyLimits = BODY_LIMITS
    allowed_origins: tuple[str, ...] = ()
    transfer: TransferSettings = field(default_factory=TransferSettings)


class Proxy:
    """The routes of one proxy.

    Raises:
        ConfigurationError: the files for TLS cannot be used.
    """

    def __init__(self, options: ProxyOptions) -> None:
        self._options = options
        self._servers = HttpServers(options.servers, options.discovery)
        self._bodies = Bodies(options.limits)
        found = options.discovery
        self._notices = None if found is None else TicketNotices(found, options.transfer)

    def application(self) -> web.Application:
        """The application; it opens its connections when it starts."""
        app = web.Application(middlewares=[_openai_errors])
        CrossOrigin(self._options.allowed_origins).add_to(app)
        app.cleanup_ctx.append(self._connections)
        app.router.add_post(PATHS["completions"], self._completions)
        app.router.add_post(PATHS["chat"], self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    async def _connections(self, app: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S, socket_factory=_socket)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            self._session = session
            caller = HttpCaller(session, self._servers, self._notices)
            self._coordinator = Coordinator(caller, self._options.policy)
            yield
            await self._coordinator.drain()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate("completions", request)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate("chat", request)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """What a decode server says."""
        url = self._servers.pick("decode", ())
        if url is None:
            raise ServiceUnavailable("no decode server is known")
        try:
            async with self._session.get(
                f"{url}/v1/models", headers=self._headers(request)
            ) as response:
                return web.Response(
                    body=await response.read(),
                    status=response.status,
                    content_type=response.content_type,
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServiceUnavailable(f"{url} does not answer: {error}") from error

    async def _health(self, request: web.Request) -> web.Response:
        """200 only if a server of each role is healthy, else 503 saying which is not."""
        states = await asyncio.gather(*(self._state(role) for role in ROLES))
        roles = dict(zip(ROLES, states, strict=True))
        healthy = all(state == "ok" for state in roles.values())
        return web.json_response(
            {"status": "ok" if healthy else "unavailable", **roles}, status=200 if healthy else 503
        )

    async def _state(self, role: Role) -> str:
        urls = self._servers.urls(role)
        if not urls:
            return f"no {role} server is known"
        states = await asyncio.gather(*(self._server(url) for url in urls))
        return "ok" if "ok" in states else "; ".join(states)

    async def _server(self, url: str) -> str:
        try:
            async with (
                asyncio.timeout(_HEALTH_TIMEOUT_S),
                self._session.get(f"{url}/health") as got,
            ):
                return "ok" if got.status == 200 else f"{url} answered {got.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"{url} does not answer: {error or type(error).__name__}"

    async def _generate(self, method: Method, request: web.Request) -> web.StreamResponse:
        with self._bodies.request() as body:
            content = await self._read(request, body)
            fields = _fields(request, content)
            self._require_few(method, fields)
            return await self._answer(method, request, fields)

    async def _read(self, request: web.Request, body: Body) -> bytes:
        """The whole body.

        Raises:
            BodyRefused: it is too long, too slow, or one too many.
        """
        body.announced(request.content_length or 0)
        parts = []
        try:
            async with asyncio.timeout(self._bodies.limits.timeout_s):
                async for part in request.content.iter_any():
                    body.add(len(part))
                    parts.append(part)
        except TimeoutError as error:
            raise self._bodies.too_slow() from error
        return b"".join(parts)

    def _require_few(self, method: Method, fields: Mapping[str, Any]) -> None:
        prompts, samples = answers(method, fields)
        if fault := answers_fault(prompts, samples, MAX_ANSWERS):
            raise _bad_request(fault)
        if prompts == 1 or bypass_reason(JsonBody(fields, {})):
            return
        rest = {name: value for name, value in fields.items() if name != "prompt"}
        size = len(json.dumps(rest, ensure_ascii=False).encode())
        if fault := copies_fault(prompts, size, self._bodies.limits.max_body_bytes):
            raise _bad_request(fault)

    async def _answer(
        self, method: Method, request: web.Request, fields: dict[str, Any]
    ) -> web.StreamResponse:
        body = JsonBody(fields, self._headers(request))
        reason = bypass_reason(body) or not_clamped(fields)
        asked = GenerationRequest(method, body, client_id=_client_id(body, request))
        answer = await self._coordinator.answer(asked, bypass=reason is not None)
        match answer:
            case EventStream():
                async with aclosing(answer):
                    return await _stream(answer, request)
            case WholeAnswer():
                return web.Response(
                    body=answer.content, status=answer.status, headers=dict(answer.headers)
                )
            case Refusal():
                error = {"error": answer.error()}
                return web.Response(
                    body=json.dumps(error).encode(),
                    status=answer.code,
                    content_type="application/json",
                )

    def _headers(self, request: web.Request) -> dict[str, str]:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        if "Authorization" not in headers and self._options.api_key:
            headers["Authorization"] = f"Bearer {self._options.api_key}"
        return headers


def _fields(request: web.Request, content: bytes) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise _bad_request(Fault("Content-Type", "the body must be sent as application/json"))
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _bad_request(Fault("", f"the body is not valid JSON: {error}")) from error
    if not isinstance(fields, dict):
        raise _bad_request(Fault("", "the body is not a JSON object"))
    fields = as_read(fields)
    if fault := body_fault(fields) or header_fault(request.headers):
        raise _bad_request(fault)
    return fields


def _client_id(body: JsonBody, request: web.Request) -> str:
    """What the client calls its request, as vLLM looks for it."""
    given = request.headers.get("X-Request-Id", body.fields.get("request_id"))
    return given if isinstance(given, str) else ""


async def _stream(events: EventStream, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    async with aclosing(as_events(events)) as texts:
        async for text in texts:
            await response.write(text.encode())
    await response.write_eof()
    return response


def _bad_request(fault: Fault) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=json.dumps(error_body(400, fault.message, param=fault.param)),
        content_type="application/json",
    )


@web.middleware
async def _openai_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors of the proxy itself, in OpenAI's form."""
    try:
        return await handler(request)
    except ServiceUnavailable as error:
        seconds = max(1, round(error.retry_after_s))
        return web.json_response(
            error_body(503, str(error)), status=503, headers={"Retry-After": str(seconds)}
        )
    except BodyRefused as refused:
        again = refused.retry_after_s
        return web.json_response(
            error_body(refused.status, str(refused), param="body"),
            status=refused.status,
            headers=None if again is None else {"Retry-After": str(again)},
        )
    except web.HTTPException as error:
        if error.content_type == "application/json":
            raise
        message = error.text or error.reason
        return web.json_response(error_body(error.status, message), status=error.status)


def _socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    for level, option, value in _KEEP_ALIVE:
        made.setsockopt(level, option, value)
    return made
