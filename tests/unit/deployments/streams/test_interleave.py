"""Several streams as one: a bounded number at a time, and none left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.streams.interleave import interleaved
from tests.support.scripted.replicas import drive


class Streams:
    """Streams that count how many of them run."""

    def __init__(self) -> None:
        self.running = self.most = self.begun = 0

    def make(
        self, *items: int, error: Exception | None = None
    ) -> Callable[[], AsyncGenerator[int, None]]:
        async def stream() -> AsyncGenerator[int, None]:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                for item in items:
                    await asyncio.sleep(0)
                    yield item
                if error is not None:
                    raise error
            finally:
                self.running -= 1

        return stream


@given(st.lists(st.lists(st.integers(), max_size=20), max_size=6), st.integers(1, 7))
def test_everything_comes_in_order_and_not_too_much_at_once(
    lists: list[list[int]], at_once: int
) -> None:
    streams = Streams()
    got: list[list[int]] = [[] for _ in lists]

    async def main() -> None:
        async for number, item in interleaved([streams.make(*one) for one in lists], at_once):
            got[number].append(item)

    drive(main())
    assert got == lists
    assert streams.most <= at_once
    assert (streams.begun, streams.running) == (len(lists), 0)


def test_an_error_ends_all() -> None:
    streams = Streams()
    makers = [streams.make(*range(1000)), streams.make(1, error=KeyError("x")), streams.make(1)]

    async def main() -> None:
        with pytest.raises(KeyError):
            async for _ in interleaved(makers, 2):
                pass

    drive(main())
    assert (streams.begun, streams.running) == (2, 0)


def test_a_stream_that_ends_with_a_cancellation_of_something_else_ends_all() -> None:
    streams = Streams()

    async def foreign() -> AsyncGenerator[int, None]:
        pick: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        pick.cancel()
        yield await pick

    async def main() -> None:
        async with asyncio.timeout(1.0) as limit:
            with pytest.raises(asyncio.CancelledError):
                async for _ in interleaved([streams.make(*range(1000)), foreign], 2):
                    pass
        assert not limit.expired()

    drive(main())
    assert (streams.begun, streams.running) == (1, 0)


@pytest.mark.parametrize("after", [0, 1, 30])
def test_closing_ends_all(after: int) -> None:
    streams = Streams()

    async def main() -> None:
        items = interleaved([streams.make(*range(100)) for _ in range(5)], 3)
        async with aclosing(items):
            for _ in range(after):
                await anext(items)
        assert streams.running == 0

    drive(main())


def test_a_reader_that_is_cancelled_ends_all() -> None:
    streams = Streams()

    async def hang() -> AsyncGenerator[int, None]:
        async for item in streams.make(1)():
            yield item
        await asyncio.Event().wait()

    async def main() -> None:
        async def read() -> None:
            async for _ in interleaved([streams.make(1), hang, streams.make(1)], 2):
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    drive(main())
    assert streams.running == 0


def test_streams_wait_for_a_slow_reader() -> None:
    made: list[int] = []

    async def counting() -> AsyncGenerator[int, None]:
        for number in range(1000):
            made.append(number)
            yield number

    async def main() -> None:
        items = interleaved([counting], 1)
        async with aclosing(items):
            await anext(items)
            await asyncio.sleep(0.01)
            assert len(made) < 20

    drive(main())
