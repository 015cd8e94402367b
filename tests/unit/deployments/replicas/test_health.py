from __future__ import annotations

from typing import Any

import pytest

from deployments.replicas.health import EngineHealth, TransferUnhealthy

FINE: dict[str, Any] = {"engine_id": "e1", "rank": 0, "healthy": True, "registered": True}


def health(now: float = 100.0) -> EngineHealth:
    return EngineHealth(timeout_s=60.0, now=now)


def test_engine_that_answers_is_healthy() -> None:
    engine = health()
    engine.take([FINE, {**FINE, "rank": 1}], 110.0)

    engine.require(110.0)
    engine.require(170.0)


@pytest.mark.parametrize(
    ("statuses", "fault"),
    [
        ([], "no worker"),
        ([FINE, {**FINE, "rank": 1, "healthy": False}], "transfer engine of rank 1 of e1 is down"),
        ([{**FINE, "registered": False}], "another start of rank 0 of e1"),
    ],
)
def test_faults_show_at_once_and_go_when_they_are_over(
    statuses: list[dict[str, Any]], fault: str
) -> None:
    engine = health()
    engine.take(statuses, 101.0)
    with pytest.raises(TransferUnhealthy, match=fault):
        engine.require(101.0)

    engine.take([FINE], 102.0)
    engine.require(102.0)


def test_long_step_is_no_illness_but_silence_is() -> None:
    engine = health()
    engine.take([FINE], 100.0)
    engine.require(159.0)
    with pytest.raises(TransferUnhealthy, match="not answered for 61 s"):
        engine.require(161.0)


def test_engine_that_never_answers_is_unhealthy_in_the_end() -> None:
    engine = health(now=5.0)
    engine.require(64.0)
    with pytest.raises(TransferUnhealthy):
        engine.require(66.0)
