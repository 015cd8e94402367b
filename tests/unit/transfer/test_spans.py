"""Span arithmetic against plain Python on small cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import RegistrationError
from transfer.spans import (
    block_spans,
    by_remote_address,
    check_spans,
    concat,
    coverage,
    empty_spans,
    join_neighbours,
    lies_within,
    merge_adjacent,
    overlaps_itself,
    slice_plan,
    total_bytes,
    without_first,
)
from transfer.types import ReadPlan, SpanArray

ROWS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=12)


def spans(rows: list[tuple[int, int]]) -> SpanArray:
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def addresses(array: SpanArray) -> list[int]:
    """Every byte's address, in order."""
    return [address for start, length in array.tolist() for address in range(start, start + length)]


def test_block_spans() -> None:
    result = block_spans(1000, 64, 48, [2, 0, 5])
    assert result.tolist() == [[1128, 48], [1000, 48], [1320, 48]]
    assert result.dtype == np.uint64
    assert result.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint64])
def test_block_spans_takes_any_integers(dtype: type[np.integer]) -> None:
    base = (1 << 62) + 7
    result = block_spans(base, 1 << 20, 1, np.array([3], dtype=dtype))
    assert result.tolist() == [[base + (3 << 20), 1]]


def test_no_blocks_are_no_spans() -> None:
    assert block_spans(1000, 64, 48, []).shape == (0, 2)
    assert concat([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("base", "stride", "length", "block_ids"),
    [
        (-1, 64, 64, [0]),
        (0, -64, 64, [0]),
        (0, 64, 0, [0]),
        (0, 64, 64, [-1]),
        (0, 64, 64, [1.5]),
        (0, 64, 64, [[1]]),
        (0, 1 << 62, 64, [2]),
    ],
)
def test_blocks_that_cannot_be_memory_are_refused(
    base: int, stride: int, length: int, block_ids: list[int]
) -> None:
    with pytest.raises(RegistrationError):
        block_spans(base, stride, length, block_ids)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), dtype=np.uint64),
        np.zeros(4, dtype=np.uint64),
        np.ones((2, 2), dtype=np.int64),
        spans([(5, 0)]),
        spans([(1 << 63, 1)]),
        spans([(1, 1 << 63)]),
        spans([(1, (1 << 63) - 1)] * 3),
    ],
)
def test_arrays_that_cannot_be_memory_are_refused(array: SpanArray) -> None:
    with pytest.raises(RegistrationError):
        check_spans(array)


@given(ROWS)
def test_coverage_has_the_same_bytes_and_no_seams(rows: list[tuple[int, int]]) -> None:
    array = spans(rows)
    cover = coverage(array)
    assert addresses(cover) == sorted(set(addresses(array)))
    ends = cover[:, 0] + cover[:, 1]
    assert (cover[1:, 0] > ends[:-1]).all()


@given(ROWS, ROWS)
def test_lies_within(rows: list[tuple[int, int]], grant: list[tuple[int, int]]) -> None:
    array, cover = spans(rows), coverage(spans(grant))
    assert lies_within(array, cover) == (set(addresses(array)) <= set(addresses(cover)))


@pytest.mark.parametrize("seed", range(30))
def test_lies_within_a_cover_of_many_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    starts = np.arange(0, 3000, 10)[random.random(300) < 0.6]
    cover = coverage(spans([(int(at), int(random.integers(1, 10))) for at in starts]))
    granted = set(addresses(cover))
    inside = cover[random.permutation(cover.shape[0])[:40]].tolist()
    for rows in ([*inside, [2999, 2]], [[0, 3000], *inside], inside, cover.tolist()):
        array = spans(rows)
        assert lies_within(array, cover) == (set(addresses(array)) <= granted)
    address, length = inside[0]
    assert not lies_within(spans([*inside[1:], (address, length + 1)]), cover)


def test_a_length_that_wraps_around_lies_nowhere() -> None:
    assert not lies_within(spans([(10, (1 << 64) - 5)]), spans([(0, 20)]))


@given(ROWS)
def test_overlaps_itself(rows: list[tuple[int, int]]) -> None:
    taken = addresses(spans(rows))
    assert overlaps_itself(spans(rows)) == (len(set(taken)) != len(taken))


@st.composite
def plans(draw: st.DrawFn) -> ReadPlan:
    """Plans in which neighbours often touch on one side or on both."""
    local, remote = [], []
    local_at, remote_at = 1000, 5000
    for _ in range(draw(st.integers(0, 12))):
        length = draw(st.integers(1, 9))
        local.append((local_at, length))
        remote.append((remote_at, length))
        local_at += length + draw(st.sampled_from([0, 0, 3]))
        remote_at += length + draw(st.sampled_from([0, 0, 7, -20]))
    return ReadPlan(spans(local), spans(remote))


def pairs(plan: ReadPlan) -> list[tuple[int, int]]:
    return list(zip(addresses(plan.local), addresses(plan.remote), strict=True))


@given(plans())
def test_merging_moves_the_same_bytes_in_no_more_rows_than_needed(plan: ReadPlan) -> None:
    merged = merge_adjacent(plan)
    assert pairs(merged) == pairs(plan)
    local_ends = merged.local[:, 0] + merged.local[:, 1]
    remote_ends = merged.remote[:, 0] + merged.remote[:, 1]
    both = (merged.local[1:, 0] == local_ends[:-1]) & (merged.remote[1:, 0] == remote_ends[:-1])
    assert not both.any()


@given(plan=plans())
def test_the_order_of_the_remote_side_keeps_pairs_together(plan: ReadPlan) -> None:
    ordered = by_remote_address(plan)
    starts = ordered.remote[:, 0].tolist()
    assert starts == sorted(starts)
    assert sorted(pairs(ordered)) == sorted(pairs(plan))


@given(rows=ROWS)
def test_joined_neighbours_are_the_same_bytes_in_order(
    rows: list[tuple[int, int]],
) -> None:
    array = spans(rows)
    joined = join_neighbours(array)
    assert addresses(joined) == addresses(array)
    after = joined[1:, 0] == joined[:-1, 0] + joined[:-1, 1]
    assert not after.any()


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RegistrationError):
        merge_adjacent(ReadPlan(spans([(1, 2)]), spans([(1, 3)])))
    with pytest.raises(RegistrationError):
        merge_adjacent(ReadPlan(spans([(1, 2)]), empty_spans()))


@given(plans(), st.integers(1, 20), st.integers(1, 4))
def test_slices_are_bounded_and_together_the_plan(
    plan: ReadPlan, max_bytes: int, max_rows: int
) -> None:
    slices = list(slice_plan(plan, max_bytes, max_rows))
    assert [pair for slice_ in slices for pair in pairs(slice_)] == pairs(plan)
    for slice_ in slices:
        assert 0 < total_bytes(slice_.local) <= max_bytes
        assert 0 < slice_.local.shape[0] <= max_rows
        assert np.array_equal(slice_.local[:, 1], slice_.remote[:, 1])


@given(plans(), st.data())
def test_the_rest_of_a_plan_is_what_was_not_moved(plan: ReadPlan, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, total_bytes(plan.local)))
    rest = without_first(plan, done)
    assert addresses(rest.local) == addresses(plan.local)[done:]
    assert addresses(rest.remote) == addresses(plan.remote)[done:]


def test_slices_are_full_when_rows_allow() -> None:
    plan = ReadPlan(spans([(0, 25)]), spans([(100, 25)]))
    assert [total_bytes(slice_.local) for slice_ in slice_plan(plan, 10, 9)] == [10, 10, 5]


@pytest.mark.parametrize(("max_bytes", "max_rows"), [(0, 1), (1, 0)])
def test_slices_of_nothing_are_refused(max_bytes: int, max_rows: int) -> None:
    plan = ReadPlan(spans([(0, 25)]), spans([(100, 25)]))
    with pytest.raises(RegistrationError):
        list(slice_plan(plan, max_bytes, max_rows))
