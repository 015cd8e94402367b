"""Slots are never handed out twice, and all come back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transfer.connector.memory.slots import SlotPool, count_slots
from transfer.connector.scheduling.block_places import NoSlots
from transfer.connector.scheduling.slot_queue import SlotQueue
from transfer.errors import ConfigurationError

SLOTS = range(5, 25)


class Pools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SLOTS)
        self.taken: list[list[int]] = []

    @rule(count=st.integers(0, 12))
    def take(self, count: int) -> None:
        free = self.pool.num_free
        slots = self.pool.take(count)
        assert (slots is None) is (count > free)
        if slots is not None:
            assert len(slots) == count
            self.taken.append(slots)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slots = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.pool.give_back(data.draw(st.permutations(slots)))

    @precondition(lambda self: any(self.taken))
    @rule(data=st.data())
    def give_back_twice(self, data: st.DataObject) -> None:
        slots = data.draw(st.sampled_from([slots for slots in self.taken if slots]))
        with pytest.raises(ValueError, match="named twice"):
            self.pool.give_back([*slots, slots[0]])

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def give_back_what_is_free(self, data: st.DataObject) -> None:
        taken = {slot for slots in self.taken for slot in slots}
        free = data.draw(st.sampled_from(sorted(set(SLOTS) - taken)))
        own = self.taken[0] if self.taken else []
        with pytest.raises(ValueError, match="not taken"):
            self.pool.give_back([*own, free])

    @invariant()
    def nobody_shares(self) -> None:
        taken = [slot for slots in self.taken for slot in slots]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(SLOTS)
        assert self.pool.num_free == len(SLOTS) - len(taken)

    def teardown(self) -> None:
        for slots in self.taken:
            self.pool.give_back(slots)
        assert self.pool.take(len(SLOTS)) == list(SLOTS)


TestPools = Pools.TestCase


def test_the_lowest_are_taken_first() -> None:
    pool = SlotPool(range(8))
    assert pool.take(3) == [0, 1, 2]
    assert pool.take(2) == [3, 4]
    pool.give_back([2, 0, 1])
    assert pool.take(4) == [0, 1, 2, 5]


def test_a_long_prompt_gets_its_turn_before_short_ones_that_came_later() -> None:
    queue = SlotQueue(SlotPool(range(4)))
    queue.take("running", 3)
    assert not queue.has_room("long", 4)
    assert not queue.has_room("short", 1)

    queue.give_back("running")

    assert not queue.has_room("short", 1)
    assert queue.has_room("long", 4)
    queue.take("long", 4)
    queue.give_back("long")
    assert queue.has_room("short", 1)


def test_who_gives_up_waiting_lets_the_next_one_in() -> None:
    queue = SlotQueue(SlotPool(range(4)))
    queue.take("running", 3)
    assert not queue.has_room("long", 4)
    assert not queue.has_room("short", 1)

    queue.give_back("long")

    assert queue.has_room("short", 1)


def test_who_holds_slots_keeps_them() -> None:
    queue = SlotQueue(SlotPool(range(4)))
    queue.take("preempted", 3)
    assert not queue.has_room("other", 2)

    assert queue.has_room("preempted", 3)
    queue.take("preempted", 3)

    assert queue.places_of("preempted", [7, 8, 9]) == (0, 1, 2)
    assert queue.places_of("preempted", [7, 8]) == (0, 1)
    queue.give_back("preempted")
    queue.give_back("preempted")
    assert queue.places_of("preempted", [7, 8, 9]) == ()
    assert queue.has_room("other", 2)


def test_without_slots_there_is_room_where_the_blocks_are() -> None:
    places = NoSlots()
    for request_id in ("one", "other"):
        assert places.has_room(request_id, 1 << 40)
        places.take(request_id, 1 << 40)

    assert places.places_of("one", [7, 2, 9]) == (7, 2, 9)
    places.give_back("one")
    places.give_back("one")
    assert places.places_of("one", [7]) == (7,)


def test_slots_that_nobody_asked_for_are_refused() -> None:
    queue = SlotQueue(SlotPool(range(4)))
    with pytest.raises(RuntimeError, match="5 slots for request r"):
        queue.take("r", 5)


SIZES: dict[str, Any] = {"block_bytes": 100, "num_blocks": 1000, "prompt_blocks": 10, "roles": 1}


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({}, 40),
        ({"num_blocks": 25}, 25),
        ({"num_blocks": 3}, 10),
        ({"roles": 2}, 40),
        ({"roles": 2, "num_blocks": 3}, 20),
        ({"host_bytes": 1000}, 10),
        ({"host_bytes": 7777}, 77),
        ({"host_bytes": 1 << 40}, 1000),
        ({"host_bytes": 2000, "roles": 2}, 20),
    ],
)
def test_number_of_slots(changes: dict[str, int], slots: int) -> None:
    assert count_slots(**{"host_bytes": 0, **SIZES, **changes}) == slots


@pytest.mark.parametrize(("roles", "would_do"), [(1, "1000 would do"), (2, "2000 would do")])
def test_too_few_bytes_are_refused_by_name(roles: int, would_do: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        count_slots(host_bytes=999, **{**SIZES, "roles": roles})
    assert caught.value.message.startswith("transfer.host_staging_bytes is 999, too few")
    assert would_do in caught.value.message


@given(
    host_bytes=st.integers(0, 1 << 20),
    block_bytes=st.integers(1, 1 << 12),
    num_blocks=st.integers(1, 1 << 12),
    prompt_blocks=st.integers(1, 1 << 10),
    roles=st.integers(1, 2),
)
def test_every_role_has_room_for_a_prompt(**sizes: int) -> None:
    least = sizes["roles"] * sizes["prompt_blocks"]
    try:
        slots = count_slots(**sizes)
    except ConfigurationError:
        assert 0 < sizes["host_bytes"] < least * sizes["block_bytes"]
        return
    assert least <= slots <= max(least, sizes["num_blocks"])
    assert not sizes["host_bytes"] or slots * sizes["block_bytes"] <= sizes["host_bytes"]
