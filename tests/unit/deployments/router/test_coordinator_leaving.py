"""Clients that leave: no replica works for nobody, and blocks are given up."""

from __future__ import annotations

import asyncio

import pytest

from deployments.router.coordinator import Coordinator
from deployments.router.request_state import RetryPolicy
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import PrefillAnswer
from tests.support.scripted.replicas import (
    CHUNKS,
    HANG,
    POLICY,
    SHARED,
    T1,
    FakeCaller,
    drive,
    generation,
    lost,
)


def left_while_waiting(caller: FakeCaller, policy: RetryPolicy = POLICY) -> None:
    """The client leaves while its first chunk is awaited: Serve cancels the task."""

    async def main() -> None:
        coordinator = Coordinator(caller, policy)
        waiting = asyncio.ensure_future(coordinator.answer(generation()))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert caller.open_calls == 0, "a replica still works for nobody"
        await coordinator.drain()

    drive(main())


def test_client_leaves_during_prefill() -> None:
    caller = FakeCaller([HANG], [])

    left_while_waiting(caller)

    assert caller.calls() == [("prefill", set())]
    assert caller.aborted == []


def test_client_leaves_before_the_first_chunk() -> None:
    caller = FakeCaller([PrefillAnswer("p1", SHARED)], [[HANG]])

    left_while_waiting(caller)

    assert caller.calls() == [("prefill", set()), ("decode", set())]
    assert caller.aborted == [("p1", SHARED)]


def test_client_leaves_during_a_pause() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[lost("d1")]])

    left_while_waiting(caller, RetryPolicy(backoff_s=60.0, backoff_max_s=60.0))

    assert caller.calls() == [("prefill", set()), ("decode", set())]
    assert caller.aborted == [("p1", T1)]


def test_client_leaves_in_mid_stream_while_a_chunk_is_awaited() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[CHUNKS[0], HANG]])

    async def main() -> None:
        answer = await Coordinator(caller, POLICY).answer(generation())
        assert isinstance(answer, EventStream)
        assert await anext(answer) == CHUNKS[0]
        waiting = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert caller.open_calls == 0

    drive(main())
    assert caller.aborted == []


def test_closing_in_mid_stream_ends_the_decode_call_before_it_returns() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[CHUNKS[0], HANG]])

    async def main() -> None:
        answer = await Coordinator(caller, POLICY).answer(generation())
        assert isinstance(answer, EventStream)
        assert await anext(answer) == CHUNKS[0]
        assert caller.open_calls == 1

        await answer.aclose()

        assert caller.open_calls == 0

    drive(main())
    assert caller.aborted == []


def test_closing_a_stream_of_which_nothing_was_taken_ends_the_decode_call() -> None:
    caller = FakeCaller([PrefillAnswer("p1", SHARED)], [[CHUNKS[0], HANG]])

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        answer = await coordinator.answer(generation())
        assert isinstance(answer, EventStream)

        await answer.aclose()

        assert caller.open_calls == 0
        await coordinator.drain()

    drive(main())
    assert caller.aborted == [("p1", SHARED)]


def test_a_client_that_left_before_the_start_calls_nobody() -> None:
    caller = FakeCaller([], [])

    async def main() -> None:
        asking = asyncio.ensure_future(Coordinator(caller, POLICY).answer(generation()))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    drive(main())
    assert caller.log == []
