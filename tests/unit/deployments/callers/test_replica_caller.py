"""What the router makes of what replicas of Serve answer, and of what Ray raises."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RequestCancelledError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.background import Background
from deployments.callers import replica_caller as replica
from deployments.callers.replica_caller import ReplicaCaller
from deployments.errors import NoReplica, ReplicaLost
from deployments.replicas.health import TransferUnhealthy
from tests.support.scripted.handles import FakeHandle, Script, answers, fails, hangs
from tests.support.scripted.replicas import drive, generation

DOWN = TransferUnhealthy("the transfer engine of rank 0 of e is down")


def caller_of(
    prefill: dict[str, Script] | None = None, decode: dict[str, Script] | None = None
) -> tuple[ReplicaCaller, FakeHandle, FakeHandle]:
    handles: Any = FakeHandle(prefill or {}), FakeHandle(decode or {})
    return ReplicaCaller(*handles, pick_timeout_s=0.05), *handles


# ---- who is well ---------------------------------------------------------------------------------


def test_a_replica_that_says_that_it_is_not_well_is_lost_and_its_engine_was_not_at_risk() -> None:
    async def main() -> None:
        caller, _, _ = caller_of(decode={"d1": fails(DOWN)})
        for asked in (caller.ready("decode", 1.0), caller.well("decode", frozenset())):
            with pytest.raises(ReplicaLost, match=f"d1 was lost: it is not well: {DOWN}$") as lost:
                await asked
            assert not lost.value.held

    drive(main())


def test_readiness_has_its_time_and_then_the_call_is_cancelled() -> None:
    async def main() -> None:
        caller, prefill, _ = caller_of(prefill={"p1": hangs})
        with pytest.raises(TimeoutError):
            await caller.ready("prefill", 0.01)
        (response,) = prefill.responses
        assert response.was_cancelled
        with pytest.raises(NoReplica):
            await caller.ready("decode", 1.0)

        caller, *_ = caller_of(prefill={"p1": answers("p1")})
        assert await caller.ready("prefill", 1.0) == "p1"

    drive(main())


async def dies_cancelled(method_name: str, *args: Any) -> Any:
    """What Ray makes of a task that somebody else cancelled."""
    raise asyncio.CancelledError


def test_one_replica_that_hangs_does_not_silence_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica, "WELL_TIMEOUT_S", 0.05)

    async def main() -> None:
        caller, _, decode = caller_of(
            decode={
                "d1": answers("d1"),
                "d2": hangs,
                "d3": fails(DOWN),
                "d4": dies_cancelled,
                "d5": answers("d5"),
            }
        )
        assert await caller.replicas("decode") == 2
        assert [response.was_cancelled for response in decode.responses] == [
            False,
            True,
            False,
            False,
            False,
        ]

        one, two = {"rank": 0}, {"rank": 1}
        caller, *_ = caller_of(decode={"d1": answers([one, two]), "d2": hangs, "d3": fails(DOWN)})
        assert await caller.status("decode", 0.05) == [one, two]
        assert await caller.status("prefill", 0.05) == []

    drive(main())


# ---- picks ---------------------------------------------------------------------------------------


def test_a_pick_that_the_router_gives_up_found_no_replica() -> None:
    def given_up() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        caller, prefill, _ = caller_of(prefill={"p1": answers(1)})
        prefill.picking = given_up
        with pytest.raises(NoReplica):
            await caller.prefill(generation(), frozenset())

    drive(main())


def test_a_request_that_is_cancelled_while_it_waits_for_a_replica_ends() -> None:
    async def main() -> None:
        caller, *_ = caller_of()
        waiting = asyncio.ensure_future(caller.check(generation()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    drive(main())


# ---- prefills whose answer nobody gets -----------------------------------------------------------


def unreachable_at_first() -> Script:
    """A replica that computes the prompt while its caller is told that it cannot be reached."""

    async def script(method_name: str, *args: Any) -> Any:
        if method_name == "prefill":
            raise ActorUnavailableError("the connection broke", None)
        return 1

    return script


def given_up(handle: FakeHandle) -> list[tuple[str, str]]:
    """What replicas were told to let go of, for whom they had computed it."""
    (_, handoff_id) = handle.calls[0][2]
    told = [(name, method) for name, method, args in handle.calls if args == ([handoff_id],)]
    assert len(told) == len(handle.calls) - 1
    return told


def test_a_replica_that_could_not_be_reached_is_told_to_give_its_blocks_up() -> None:
    async def main() -> None:
        caller, prefill, _ = caller_of(prefill={"p1": unreachable_at_first()})
        with pytest.raises(ReplicaLost):
            await caller.prefill(generation(), frozenset())
        await asyncio.sleep(0.01)
        assert given_up(prefill) == [("p1", "abort_handoffs")]

    drive(main())


@pytest.mark.parametrize("error", [EngineDeadError(), ActorDiedError()])
def test_a_replica_that_died_has_nothing_to_give_up(error: Exception) -> None:
    async def main() -> None:
        caller, prefill, _ = caller_of(prefill={"p1": fails(error)})
        with pytest.raises(ReplicaLost):
            await caller.prefill(generation(), frozenset())
        await asyncio.sleep(0.01)
        assert given_up(prefill) == []

    drive(main())


def test_a_client_that_leaves_during_prefill_is_no_trouble(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        caller, prefill, _ = caller_of(prefill={"p1": ends_when_cancelled})
        leaving = asyncio.ensure_future(caller.prefill(generation(), frozenset()))
        await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        # The replica takes its leave, and its last word is that it is gone.
        await asyncio.sleep(0.01)
        assert given_up(prefill) == [("p1", "abort_handoffs")]

    drive(main())
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


async def ends_when_cancelled(method_name: str, *args: Any) -> Any:
    """Serve's word for a call that was cancelled; a notice finds nobody."""
    if method_name == "abort_handoffs":
        raise RayTaskError(method_name, "ray::abort()", EngineDeadError()).as_instanceof_cause()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise RequestCancelledError("r") from None


def test_work_of_its_own_that_fails_is_told_under_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async def fails_at_once() -> None:
            raise KeyError("x")

        background = Background()
        background.start("counting", fails_at_once())
        await background.drain()
        await asyncio.sleep(0)

    drive(main())
    assert caplog.messages == ["counting failed: 'x'"]
