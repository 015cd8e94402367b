"""What is checked before a request is even parsed: who asks, how much they send, and how fast."""

from __future__ import annotations

import asyncio

from ray.exceptions import RayError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api_keys import ApiKeys
from serve_app.edge.body_limits import Bodies, Body, BodyLimits, BodyRefused
from serve_app.ingress.cache_salt import salt_of_key
from serve_app.ingress.http_errors import error_response

_OPEN_PATHS = frozenset({"/health", "/metrics"})
_AUTHORIZATION = b"authorization"


class Guard:
    """ASGI middleware: bearer keys and limits for bodies.

    Nothing behind it sees an accepted key, so that none can turn up in a log there. What stands for
    it is ``request.state.salt_of_key``, see :mod:`serve_app.ingress.cache_salt`.

    Args:
        app: what comes after.
        api_keys: accepted keys; empty: anybody may ask. ``/health`` and ``/metrics`` need none.
        limits: of bodies, counted while they arrive.
    """

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys, limits: BodyLimits) -> None:
        self._app = app
        self._api_keys = api_keys
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope.get("headers", [])}
        # Under a route prefix Serve puts it into both.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_keys:
            key = None if path in _OPEN_PATHS else self._accepted(headers)
            if key is None and path not in _OPEN_PATHS:
                response = error_response(
                    401,
                    "a valid key is needed: send the header `Authorization: Bearer <key>`",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
            scope = _behind(scope, key)
        receive = _until_the_client_left(receive)
        # Python refuses to read numbers of thousands of digits; the first 18 say enough.
        length = headers.get(b"content-length", b"").lstrip(b"0")[:18]
        with self._bodies.request() as body:
            try:
                body.announced(int(length) if length.isdigit() else 0)
                messages = await self._read(receive, body)
            except BodyRefused as refused:
                await _refusal(refused)(scope, receive, send)
                return
            messages.reverse()

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self._app(scope, replay, send)

    def _accepted(self, headers: dict[bytes, bytes]) -> bytes | None:
        kind, _, key = headers.get(_AUTHORIZATION, b"").partition(b" ")
        return self._api_keys.match(key.strip()) if kind.lower() == b"bearer" else None

    async def _read(self, receive: Receive, body: Body) -> list[Message]:
        """The whole body: once the app runs, its answer may have begun."""
        messages: list[Message] = []
        try:
            async with asyncio.timeout(self._bodies.limits.timeout_s):
                while True:
                    message = await receive()
                    messages.append(message)
                    body.add(len(message.get("body", b"")))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return messages
        except TimeoutError as error:
            raise self._bodies.too_slow() from error


def _until_the_client_left(receive: Receive) -> Receive:
    """``receive`` that tells of a lost client as ASGI has it.

    Serve cancels the call to its proxy that waits for more from the client, when it cancels the
    request; if that comes first, ``receive`` raises Ray's error in place of ``http.disconnect``.
    """

    async def receive_or_tell() -> Message:
        try:
            return await receive()
        except RayError:
            return {"type": "http.disconnect"}

    return receive_or_tell


def _refusal(refused: BodyRefused) -> JSONResponse:
    again = refused.retry_after_s
    headers = None if again is None else {"Retry-After": str(again)}
    return error_response(refused.status, str(refused), param="body", headers=headers)


def _behind(scope: Scope, key: bytes | None) -> Scope:
    """The request as it is seen behind the guard."""
    headers = [pair for pair in scope.get("headers", []) if pair[0].lower() != _AUTHORIZATION]
    state = {**scope.get("state", {})}
    if key is not None:
        state["salt_of_key"] = salt_of_key(key)
    return {**scope, "headers": headers, "state": state}
