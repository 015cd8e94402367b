"""What stands in Serve's HTTP proxies, before even their own code sees a request."""

from __future__ import annotations

from typing import Final

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ray_internals.headers import (
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from serve_app.edge.error_body import error_body
from serve_app.edge.request_edge import Fault


def middlewares() -> list[Middleware]:
    """Serve asks for them when a proxy starts, if it is told to by a variable; see the launcher."""
    return [Middleware(ReadableHeaders)]


class ReadableHeaders:
    """ASGI middleware: refuses bytes outside UTF-8 in headers that Serve reads as text.

    Others may hold what they like, as with vLLM's own server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()) if scope["type"] == "http" else ():
            if _plain(name) in _READ_BY_SERVE and not _is_text(value):
                fault = Fault(name.decode("latin-1"), "it must be text in UTF-8")
                body = error_body(400, fault.message, param=fault.param)
                await JSONResponse(body, status_code=400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _plain(name: bytes) -> bytes:
    """Serve takes either spelling."""
    return name.lower().replace(b"-", b"_")


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


_READ_BY_SERVE: Final = frozenset(
    _plain(name.encode())
    for name in (SERVE_HTTP_REQUEST_ID_HEADER, SERVE_MULTIPLEXED_MODEL_ID, SERVE_SESSION_ID)
)
