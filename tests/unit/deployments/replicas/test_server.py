from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.errors import EngineGone
from deployments.replicas import server


class FakeEngine:
    """Tells, one call after the other, how much each rank offers; then that it is dead."""

    def __init__(self, *offers: list[int]) -> None:
        self.offers = list(offers)
        self.is_dead = not offers

    async def transfer_status(self) -> list[dict[str, Any]]:
        if not self.offers:
            raise EngineDeadError
        return [{"offers": count} for count in self.offers.pop(0)]


@pytest.mark.parametrize(
    ("offers", "left"),
    [
        ([[0]], 0),
        ([[1], [1], [0], [5]], 1),
        ([[0, 2], [0, 0], [5, 5]], 1),
        ([[1], [1]], 0),
    ],
    ids=["nothing offered", "read in time", "two ranks", "dies"],
)
def test_replica_that_is_stopped_waits_for_its_readers(
    monkeypatch: pytest.MonkeyPatch, offers: list[list[int]], left: int
) -> None:
    monkeypatch.setattr(server, "DRAIN_POLL_S", 0.0)
    engine = FakeEngine(*offers)

    asyncio.run(server.until_nothing_is_offered(engine))

    assert len(engine.offers) == left


def test_a_call_that_comes_to_a_dead_engine_is_told_so() -> None:
    server.require_alive(FakeEngine([0]))

    with pytest.raises(EngineGone):
        server.require_alive(FakeEngine())
