"""Headers that Serve's proxy would stumble over are refused before it reads them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.ingress.http_proxy import middlewares


def answer(scope: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of what Serve's proxies answer to a request; 204 if it passes."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    async def receive() -> Message:
        raise AssertionError("the body is read")

    async def send(message: Message) -> None:
        sent.append(message)

    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)  # type: ignore[assignment]
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize("name", [b"x-request-id", b"X-Session-Id", b"serve_multiplexed_model_id"])
def test_bytes_that_are_no_text_are_refused_where_serve_reads_text(name: bytes) -> None:
    status, body = answer({"type": "http", "headers": [(b"host", b"test"), (name, b"a\xff")]})

    assert status == 400
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == name.decode()
    assert "UTF-8" in body["error"]["message"]


@pytest.mark.parametrize(
    "scope",
    [
        {"type": "http", "headers": [(b"user-agent", b"\xff"), (b"x-request-id", "ü".encode())]},
        {"type": "lifespan"},
    ],
)
def test_the_rest_passes(scope: dict[str, Any]) -> None:
    assert answer(scope)[0] == 204
