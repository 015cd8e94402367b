from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router.common import RequestRoutingContext

from deployments.replicas.replica_router import HintedRouter
from deployments.route_hint import RouteHint


def replicas(*names: str) -> list[Any]:
    """Stand in for Serve's RunningReplica."""
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


def pending(*args: Any) -> Any:
    future: Future[Any] = Future()
    return SimpleNamespace(args=list(args), routing_context=RequestRoutingContext(), future=future)


def chosen(candidates: list[Any], request: Any) -> list[list[str]]:
    # Without Serve's controller a router cannot be made; choosing needs nothing of it.
    router = HintedRouter.__new__(HintedRouter)
    ranks = asyncio.run(router.choose_replicas(candidates, request))
    return [sorted(replica.replica_id.unique_id for replica in rank) for rank in ranks]


@pytest.mark.parametrize(
    ("hint", "ranks"),
    [
        (RouteHint(), [["a", "b", "c"]]),
        (RouteHint(exclude=frozenset("a")), [["b", "c"]]),
        (RouteHint(exclude=frozenset("ac")), [["b"]]),
        (RouteHint(exclude=frozenset("xyz")), [["a", "b", "c"]]),
        (RouteHint(exclude=frozenset("abc")), []),
        (RouteHint(only="b"), [["b"]]),
        (RouteHint(only="gone"), []),
        (RouteHint(only=""), []),
        (RouteHint(only="a", exclude=frozenset("a")), [["a"]]),
    ],
)
def test_hint_decides_who_may_get_the_call(hint: RouteHint, ranks: list[list[str]]) -> None:
    assert chosen(replicas("a", "b", "c"), pending(hint, "more", "arguments")) == ranks


@pytest.mark.parametrize(
    ("hint", "all_may"),
    [
        (RouteHint(until_s=1.0), True),
        (RouteHint(exclude=frozenset("a")), False),
        (RouteHint(only="a"), False),
        (RouteHint(only=""), False),
    ],
)
def test_whether_any_replica_will_do(hint: RouteHint, all_may: bool) -> None:
    assert hint.admits_all is all_may


@pytest.mark.parametrize("request_", [None, pending(), pending("an argument"), pending({})])
def test_call_without_hint_may_go_anywhere(request_: Any) -> None:
    assert chosen(replicas("a", "b"), request_) == [["a", "b"]]


def test_no_replica_at_all() -> None:
    assert chosen([], pending(RouteHint())) == []


def test_waiting_for_a_replica_backs_off() -> None:
    # Otherwise Serve asks again at once, and burns a core while no replica is admitted.
    request = pending(RouteHint(only="gone"))
    chosen(replicas("a"), request)

    assert request.routing_context.should_backoff is True


@pytest.mark.parametrize("hint", [RouteHint(), RouteHint(only="gone")])
def test_a_pick_that_nobody_waits_for_any_more_is_ended(hint: RouteHint) -> None:
    """Serve would make it, or try to for ever, and has only so many tasks for all picks."""
    now_s = time.monotonic()
    late, in_time = (pending(replace(hint, until_s=now_s + left_s)) for left_s in (-1.0, 60.0))
    assert chosen(replicas("a"), late) == []
    assert late.future.cancelled()
    chosen(replicas("a"), in_time)
    assert not in_time.future.done()


def test_the_caller_is_told_who_was_there() -> None:
    hint = RouteHint(exclude=frozenset("b"))
    chosen(replicas("a", "b"), pending(replace(hint, until_s=math.inf)))
    assert hint.offered == {"a"}
    chosen([], pending(hint))
    assert hint.offered == {"a"}
    assert hint == RouteHint(exclude=frozenset("b"))
    assert RouteHint().offered == set()


def test_candidates_are_left_as_they_are() -> None:
    candidates = replicas(*"abcdefgh")
    before = list(candidates)
    chosen(candidates, pending(RouteHint()))

    assert candidates == before


def test_equals_come_in_random_order() -> None:
    router = HintedRouter.__new__(HintedRouter)
    candidates = replicas("a", "b")

    async def firsts() -> Counter[str]:
        ranks = [await router.choose_replicas(candidates, pending()) for _ in range(400)]
        return Counter(rank[0][0].replica_id.unique_id for rank in ranks)

    # Either one first in fewer than 100 of 400 tosses: less likely than 1 in 10**24.
    assert min(asyncio.run(firsts()).values()) >= 100
