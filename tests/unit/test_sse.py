from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.sse import DONE, as_events

ONE, TWO = 'data: {"text": "one"}\n\n', 'data: {"text": "two"}\n\n'


async def stream(*chunks: Any) -> AsyncGenerator[Any, None]:
    for chunk in chunks:
        await asyncio.sleep(0)
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def events(*chunks: Any) -> list[str]:
    async def main() -> list[str]:
        return [event async for event in as_events(stream(*chunks))]

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
        sent = as_events(stream(ONE, RuntimeError("a later chunk")))
        assert await anext(sent) == ONE
        with pytest.raises(RuntimeError, match="a later chunk"):
            await anext(sent)

    asyncio.run(main())
