"""Who holds which KV heads, and who reads them from whom."""

from __future__ import annotations

from itertools import product

import pytest

from transfer.connector.kv.heads import HeadRange, heads_of, parts_of, parts_to_tell
from transfer.errors import LayoutMismatch

SIZES = (1, 2, 4, 8)
CASES = [
    case
    for case in product(SIZES, SIZES, (1, 2, 3, 4, 6, 8, 32))
    if all(tp % case[2] == 0 or case[2] % tp == 0 for tp in case[:2])
]


@pytest.mark.parametrize(("tp", "heads"), [(2, 3), (8, 6), (3, 8)])
def test_heads_that_cannot_be_shared_out(tp: int, heads: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"{heads} KV heads .* {tp} ranks"):
        heads_of(0, tp, heads)


def test_heads_are_shared_out_in_order() -> None:
    assert [heads_of(rank, 2, 4) for rank in range(2)] == [HeadRange(0, 2), HeadRange(2, 4)]
    assert [heads_of(rank, 4, 2) for rank in range(4)] == [
        *[HeadRange(0, 1)] * 2,
        *[HeadRange(1, 2)] * 2,
    ]


@pytest.mark.parametrize(("tp", "owner_tp", "heads"), CASES)
def test_every_head_is_read_once_from_a_rank_that_has_it(
    tp: int, owner_tp: int, heads: int
) -> None:
    for rank in range(tp):
        read = [
            head
            for part in parts_of(rank, tp, owner_tp, heads)
            for head in range(part.heads.first, part.heads.stop)
        ]
        own = heads_of(rank, tp, heads)
        assert sorted(read) == list(range(own.first, own.stop))
        for part in parts_of(rank, tp, owner_tp, heads):
            assert not len(part.heads) or part.heads in heads_of(part.owner_rank, owner_tp, heads)


@pytest.mark.parametrize(("tp", "owner_tp", "heads"), CASES)
def test_every_owner_rank_hears_of_every_reader_exactly_as_often_as_it_was_told(
    tp: int, owner_tp: int, heads: int
) -> None:
    parts = [part for rank in range(tp) for part in parts_of(rank, tp, owner_tp, heads)]
    for owner in range(owner_tp):
        shares = [part.share for part in parts if part.owner_rank == owner]
        assert len(shares) == shares[0]
        assert set(shares) == {shares[0]}


@pytest.mark.parametrize(
    ("tp", "owner_tp", "heads", "readers_of"),
    [
        # Rank i from rank i, also where heads are replicated.
        (4, 4, 2, {0: [0], 1: [1], 2: [2], 3: [3]}),
        # Two owners have each head: the two readers of one spread over both.
        (2, 8, 2, {0: [0], 1: [], 2: [], 3: [], 4: [1], 5: [], 6: [], 7: []}),
        (4, 8, 2, {0: [0], 1: [], 2: [1], 3: [], 4: [2], 5: [], 6: [3], 7: []}),
        (4, 1, 8, {0: [0, 1, 2, 3]}),
        (1, 4, 8, {0: [0], 1: [0], 2: [0], 3: [0]}),
        (8, 2, 2, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
    ],
)
def test_readers_spread_over_owners(
    tp: int, owner_tp: int, heads: int, readers_of: dict[int, list[int]]
) -> None:
    found: dict[int, list[int]] = {owner: [] for owner in range(owner_tp)}
    for rank in range(tp):
        for part in parts_of(rank, tp, owner_tp, heads):
            if len(part.heads):
                found[part.owner_rank].append(rank)
    assert found == readers_of


@pytest.mark.parametrize(("readers", "owners"), list(product([1, 2, 3, 4], [1, 2, 4, 8])))
def test_every_owner_rank_is_told_once_that_nothing_is_read(readers: int, owners: int) -> None:
    told = [part for rank in range(readers) for part in parts_to_tell(rank, readers, owners)]

    assert sorted(part.owner_rank for part in told) == list(range(owners))
    assert all(part.share == 1 and not len(part.heads) for part in told)
