"""What the router makes of what replicas of Serve answer, and of what Ray raises."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.errors import NoReplica, ReplicaLost
from deployments.health import TransferUnhealthy
from deployments.replica import ReplicaCaller
from tests.support.scripted_handles import FakeHandle, Script, answers, fails, hangs
from tests.support.scripted_replicas import drive

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
