"""Stands in for aiohttp's session: servers that answer by a script, without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeBody:
    """The body of an answer, in one piece."""

    content: bytes

    async def iter_any(self) -> AsyncIterator[bytes]:
        yield self.content


@dataclass
class FakeAnswer:
    """What a server answers with."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> FakeBody:
        return FakeBody(self.body)

    async def read(self) -> bytes:
        return self.body


@dataclass
class FakeSession:
    """Answers every server's POSTs alike, by the server's URL.

    Attributes:
        asked: URL and body of each POST.
    """

    answers: Mapping[str, FakeAnswer]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @asynccontextmanager
    async def post(
        self, url: str, *, json: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncIterator[FakeAnswer]:
        server = next(name for name in self.answers if url.startswith(name))
        self.asked.append((server, dict(json)))
        yield self.answers[server]
