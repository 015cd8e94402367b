from __future__ import annotations

from typing import Any

from deployments.replicas.owner_breaker import BreakerPolicy, OwnerBreakers

POLICY = BreakerPolicy(failures=3, pause_s=30.0)


def status(rank: int = 0, ok: int = 0, failed: int = 0, owner: str = "p1") -> dict[str, Any]:
    return {"rank": rank, "reads_by_owner": {owner: ok}, "failed_by_owner": {owner: failed}}


def test_owner_is_left_alone_after_failures_in_a_row_and_tried_once_after_a_pause() -> None:
    breakers = OwnerBreakers(POLICY)
    assert breakers.take([status(failed=2)], 1.0) == []
    assert breakers.may_read("p1", 1.0)

    assert breakers.take([status(failed=3)], 2.0) == ["p1"]
    assert not breakers.may_read("p1", 2.0)
    assert not breakers.may_read("p1", 31.9)

    assert breakers.may_read("p1", 32.0), "the trial"
    assert not breakers.may_read("p1", 32.1), "one is enough"
    # It fails: another pause, which is not told again.
    assert breakers.take([status(failed=4)], 40.0) == []
    assert not breakers.may_read("p1", 69.9)
    assert breakers.may_read("p1", 70.0)
    # It works.
    breakers.take([status(ok=1, failed=4)], 71.0)
    assert breakers.may_read("p1", 71.0)
    assert breakers.take([status(ok=1, failed=6)], 72.0) == []
    assert breakers.take([status(ok=1, failed=7)], 73.0) == ["p1"]


def test_success_in_between_begins_the_count_anew() -> None:
    breakers = OwnerBreakers(POLICY)
    for number in range(1, 10):
        breakers.take([status(ok=number, failed=2 * number)], float(number))
        assert breakers.may_read("p1", float(number))


def test_one_bad_link_does_not_stop_the_others() -> None:
    breakers = OwnerBreakers(POLICY)
    breakers.take([status(failed=5)], 1.0)
    breakers.take([status(failed=5), status(ok=1, owner="p2")], 2.0)

    assert breakers.may_read("p2", 3.0)
    assert not breakers.may_read("p1", 3.0)


def test_one_bad_rank_is_enough() -> None:
    breakers = OwnerBreakers(POLICY)
    breakers.take([status(0, ok=9), status(1, failed=3)], 1.0)

    assert not breakers.may_read("p1", 1.0)
