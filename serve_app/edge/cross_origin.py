"""What pages of other origins in browsers are told, by the ingress and by ``baton proxy`` alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def cross_origin(app: ASGIApp, allowed: Collection[str]) -> CORSMiddleware:
    """ASGI middleware: pages of ``allowed`` origins may call with any method and header."""
    return CORSMiddleware(app, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"])


class CrossOrigin:
    """The same for an application of aiohttp.

    Args:
        allowed: origins; empty: none.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._rules = cross_origin(_nothing, allowed)

    def add_to(self, app: web.Application) -> None:
        """Answers preflight requests before any route, and marks every answer."""
        app.middlewares.insert(0, self._preflights)
        app.on_response_prepare.append(self._mark)

    @web.middleware
    async def _preflights(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        asks = {"Origin", "Access-Control-Request-Method"} <= request.headers.keys()
        if request.method != "OPTIONS" or not asks:
            return await handler(request)
        answer = self._rules.preflight_response(request_headers=Headers(request.headers))
        return web.Response(
            status=answer.status_code, body=bytes(answer.body), headers=dict(answer.headers)
        )

    async def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "headers": []}
        await self._rules.send(start, _drop, request_headers=Headers(request.headers))
        for name, value in start["headers"]:
            response.headers[name.decode()] = value.decode()


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The application behind the rules, which is not ASGI's here."""


async def _drop(message: Message) -> None:
    pass
