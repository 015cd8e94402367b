from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.streams.event_stream import EventStream
from deployments.streams.framing import DONE
from serve_app.edge.sse import as_events

ONE, TWO = 'data: {"text": "one"}\n\n', 'data: {"text": "two"}\n\n'


async def stream(*chunks: Any) -> AsyncGenerator[Any, None]:
    for chunk in chunks:
        await asyncio.sleep(0)
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def events(*chunks: Any) -> list[str]:
    async def main() -> list[str]:
        return [event async for event in as_events(EventStream("", stream(*chunks)))]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("chunks", "sent"),
    [
        ((), [DONE]),
        ((ONE, TWO), [ONE, TWO, DONE]),
        ((ONE, TWO, DONE), [ONE, TWO, DONE]),
        ((ONE, TWO + DONE), [ONE, TWO + DONE]),
        (("", ONE), [ONE, DONE]),
        ((ONE, DONE, ""), [ONE, DONE]),
        ((DONE,), [DONE]),
    ],
)
def test_chunks_become_events_that_end_with_done_once(
    chunks: tuple[Any, ...], sent: list[str]
) -> None:
    assert events(*chunks) == sent
    assert "".join(sent).count("[DONE]") == 1


def test_text_that_only_looks_like_the_end_is_not() -> None:
    quoted = 'data: {"text": "data: [DONE]"}\n\n'

    assert events(quoted) == [quoted, DONE]


def test_events_go_out_one_by_one() -> None:
    async def main() -> None:
        waiting = asyncio.Event()

        async def chunks() -> AsyncGenerator[str, None]:
            yield ONE
            await waiting.wait()
            yield TWO

        sent = as_events(EventStream("", chunks()))
        assert await anext(sent) == ONE
        waiting.set()
        assert [event async for event in sent] == [TWO, DONE]

    asyncio.run(main())


def test_whoever_stops_reading_closes_the_stream() -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def chunks() -> AsyncGenerator[str, None]:
            try:
                yield ONE
                yield TWO
            finally:
                closed.set()

        sent = as_events(EventStream("", chunks()))
        assert await anext(sent) == ONE
        await sent.aclose()
        assert closed.is_set()

    asyncio.run(main())


def test_stream_that_breaks_says_so_and_ends() -> None:
    one, error, done = events(ONE, RuntimeError("a secret of the server"))

    assert (one, done) == (ONE, DONE)
    body = json.loads(error.removeprefix("data: "))["error"]
    assert (body["type"], body["code"]) == ("server_error", 500)
    assert "secret" not in body["message"]
