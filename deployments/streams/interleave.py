"""Several asynchronous streams as one, a bounded number of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from deployments.cancellation import is_cancelled

T = TypeVar("T")

_AHEAD = 8
"""Items that may wait for the reader; then the streams wait."""


async def interleaved(
    streams: Sequence[Callable[[], AsyncGenerator[T, None]]], at_once: int
) -> AsyncGenerator[tuple[int, T], None]:
    """All items of all streams as they come, each with the number of its stream.

    Closing it closes every stream, and returns when that is done. So does an error of one of them,
    which is then raised here; a CancelledError that was not meant for it is one. A stream that has
    not begun by then never does.

    Args:
        streams: make them; begun in this order.
        at_once: how many run at the same time; the next one begins when one ends.
    """
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_AHEAD)
    waiting = iter(enumerate(streams))
    runners = [
        asyncio.ensure_future(_run(waiting, items)) for _ in range(min(at_once, len(streams)))
    ]
    left = len(runners)
    try:
        while left:
            item = await items.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)


async def _run(
    waiting: Iterator[tuple[int, Callable[[], AsyncGenerator[T, None]]]],
    items: asyncio.Queue[tuple[int, T] | BaseException | None],
) -> None:
    try:
        for number, stream in waiting:
            async with aclosing(stream()) as running:
                async for item in running:
                    await items.put((number, item))
    except asyncio.CancelledError as foreign:
        if is_cancelled():
            raise
        await items.put(foreign)
    except Exception as error:  # noqa: BLE001 - raised again by whoever reads the items
        await items.put(error)
    else:
        await items.put(None)
