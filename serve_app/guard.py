"""What is checked before a request is even parsed: who asks, and how much they send."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http_errors import error_response

_OPEN_PATHS = frozenset({"/health", "/metrics"})


class Guard:
    """ASGI middleware: bearer keys and a limit for bodies.

    Args:
        app: what comes after.
        api_keys: accepted keys; empty: anybody may ask. ``/health`` and ``/metrics`` need none.
        max_body_bytes: longer bodies get 413, counted while they arrive.
    """

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope.get("headers", [])}
        # Under a route prefix Serve puts it into both.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_keys and path not in _OPEN_PATHS and not self._admits(headers):
            response = error_response(
                401,
                "a valid key is needed: send the header `Authorization: Bearer <key>`",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await response(scope, receive, send)
            return
        # Python refuses to read numbers of thousands of digits; the first 18 say enough.
        length = headers.get(b"content-length", b"").lstrip(b"0")[:18]
        if length.isdigit() and int(length) > self._max_body_bytes:
            await self._too_long(scope, receive, send)
            return
        await self._pass_counted(scope, receive, send)

    def _admits(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._api_keys]
        return kind.lower() == b"bearer" and any(matches)

    async def _pass_counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body up to the limit first: once the app runs, its answer may have begun."""
        body: list[Message] = []
        total = 0
        while True:
            message = await receive()
            body.append(message)
            total += len(message.get("body", b""))
            if total > self._max_body_bytes:
                await self._too_long(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        body.reverse()

        async def replay() -> Message:
            return body.pop() if body else await receive()

        await self._app(scope, replay, send)

    async def _too_long(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(
            413, f"the body is longer than {self._max_body_bytes} bytes", param="body"
        )
        await response(scope, receive, send)
