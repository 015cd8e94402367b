"""Arithmetic on spans of memory. Pure numpy; no Python loop per block."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transfer.errors import Phase, RegistrationError
from transfer.types import ReadPlan, SpanArray

_ADDRESS_LIMIT = 1 << 63
_SPAN_TYPE = np.dtype(np.uint64)

_FEW = 4
"""Rows up to which plain integers beat numpy, whose every call costs a microsecond."""


_FEW_RANGES = 64
"""Rows of a cover among which a span is found faster than spans are sorted."""


def block_spans(base: int, block_stride: int, block_length: int, block_ids: ArrayLike) -> SpanArray:
    """Spans of blocks that lie at equal distances.

    Args:
        base: address of block 0.
        block_stride: bytes from the start of one block to the start of the next.
        block_length: bytes of one block that are meant; at least 1.
        block_ids: integers, shape ``[n]``, none negative.

    Returns:
        Shape ``[n, 2]``, row i is block ``block_ids[i]``.

    Raises:
        RegistrationError: when that cannot be memory.
    """
    ids = np.asarray(block_ids)
    if ids.size == 0:
        return empty_spans()
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _bad(f"block_ids must be integers of shape [n], not {ids.dtype} {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if base < 0 or block_stride < 0 or block_length < 1 or low < 0:
        raise _bad(
            f"base {base}, block_stride {block_stride}, block_length {block_length} or the "
            f"lowest block id {low} is too small"
        )
    if base + high * block_stride + block_length > _ADDRESS_LIMIT:
        raise _bad(f"block {high} ends beyond the address space")
    spans = np.empty((ids.size, 2), dtype=np.uint64)
    spans[:, 0] = ids.astype(np.uint64) * np.uint64(block_stride) + np.uint64(base)
    spans[:, 1] = block_length
    return spans


def empty_spans() -> SpanArray:
    """No span at all, shape ``[0, 2]``."""
    return np.empty((0, 2), dtype=np.uint64)


def concat(parts: Sequence[SpanArray]) -> SpanArray:
    """All rows of ``parts``, in order."""
    return np.concatenate(parts) if parts else empty_spans()


def total_bytes(spans: SpanArray) -> int:
    """Sum of the lengths, for spans that passed :func:`check_spans`."""
    if spans.shape[0] == 1:
        return int(spans[0, 1])
    return int(spans[:, 1].sum())


def check_spans(spans: SpanArray) -> SpanArray:
    """``spans`` as a C-contiguous array, if it can be one of memory.

    Raises:
        RegistrationError: wrong shape or type, an empty row, an address out of range, or more
            than 2**63 bytes together.
    """
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != _SPAN_TYPE:
        raise _bad(f"spans must be uint64 of shape [n, 2], not {spans.dtype} {spans.shape}")
    spans = np.ascontiguousarray(spans)
    total: float
    if spans.shape[0] <= _FEW:
        highest, shortest, total = 0, 1, 0
        for address, length in spans.tolist():
            highest = max(highest, address, length)
            shortest = min(shortest, length)
            total += length
    else:
        highest, shortest = int(spans.max()), int(spans[:, 1].min())
        # Float keeps the order of magnitude where 64 bits would wrap around.
        total = float(spans[:, 1].sum(dtype=np.float64))
    if highest >= _ADDRESS_LIMIT:
        raise _bad("a span begins or ends beyond the address space")
    if not shortest:
        raise _bad("a span has no bytes")
    if total >= _ADDRESS_LIMIT:
        raise _bad("the spans have more bytes than there can be")
    return spans


def coverage(spans: SpanArray) -> SpanArray:
    """The same bytes as ``spans``, sorted, with touching and overlapping rows joined."""
    if spans.shape[0] == 0:
        return spans
    starts, ends = _sorted_bounds(spans)
    # A row begins a new range if as many rows ended before it as began before it.
    begins = np.flatnonzero(np.concatenate(([True], starts[1:] > ends[:-1])))
    lasts = np.concatenate((begins[1:] - 1, [starts.size - 1]))
    # Column by column: searching the starts would else copy them every time.
    joined = np.empty((begins.size, 2), dtype=np.uint64, order="F")
    joined[:, 0] = starts[begins]
    joined[:, 1] = ends[lasts] - starts[begins]
    return joined


def lies_within(spans: SpanArray, cover: SpanArray) -> bool:
    """Whether every row of ``spans`` lies inside one row of ``cover``.

    Args:
        spans: may come from anybody: rows that can be no memory lie nowhere.
        cover: a result of :func:`coverage`.
    """
    if spans.shape[0] == 0:
        return True
    if cover.shape[0] == 0:
        return False
    if spans.shape[0] <= _FEW:
        begins = cover[:, 0]
        for address, length in spans.tolist():
            at = bisect_right(begins, address) - 1
            begin, size = cover[at].tolist()
            if at < 0 or address + length > begin + size:
                return False
        return True
    if int(spans.max()) >= _ADDRESS_LIMIT:
        return False
    if cover.shape[0] <= _FEW_RANGES:
        return _as_many_end_as_begin(spans, cover)
    # Rows of a cover do not touch, so what is joined lies in one of them or in none. Sorted, they
    # are found among many rows much faster than in the order in which they came.
    wanted = coverage(spans)
    if np.array_equal(wanted, cover):
        return True
    row = np.searchsorted(cover[:, 0], wanted[:, 0], side="right") - 1
    if int(row.min()) < 0:
        return False
    ends = cover[row, 0] + cover[row, 1]
    return bool((wanted[:, 0] + wanted[:, 1] <= ends).all())


def _as_many_end_as_begin(spans: SpanArray, cover: SpanArray) -> bool:
    """Whether in every row of ``cover`` as many spans end as begin, and all begin in one.

    Then all lie within: in the lowest row only those can end that begin there, so all do that
    begin there, and so on upwards.
    """
    begins, ends = cover[:, 0], cover[:, 0] + cover[:, 1]
    if begins.size == 1:
        lowest, highest = spans[:, 0].min(), (spans[:, 0] + spans[:, 1]).max()
        return bool(begins[0] <= lowest and highest <= ends[0])
    starts, stops = _sorted_bounds(spans)
    begun = np.searchsorted(starts, ends) - np.searchsorted(starts, begins)
    ended = np.searchsorted(stops, ends, "right") - np.searchsorted(stops, begins, "right")
    return bool((begun == ended).all()) and int(begun.sum()) == spans.shape[0]


def overlaps_itself(spans: SpanArray) -> bool:
    """Whether two rows share a byte; rows of no bytes share none but may count as if they did."""
    if spans.shape[0] < 2:
        return False
    starts, ends = _sorted_bounds(spans)
    return bool((starts[1:] < ends[:-1]).any())


def merge_adjacent(plan: ReadPlan) -> ReadPlan:
    """The same reads with rows joined that follow each other on both sides.

    Raises:
        RegistrationError: when the two sides do not fit each other row by row.
    """
    local, remote = plan.local, plan.remote
    if local.shape != remote.shape or local[:, 1].tobytes() != remote[:, 1].tobytes():
        raise _bad("local and remote spans of a plan differ in number or length of rows")
    if local.shape[0] < 2:
        return plan
    # Few rows follow each other on one side, fewer on both.
    after = 1 + np.flatnonzero(local[1:, 0] - local[:-1, 0] == local[:-1, 1])
    after = after[remote[after, 0] - remote[after - 1, 0] == remote[after - 1, 1]]
    if not after.size:
        return plan
    begins, lengths = _joined(local[:, 1], after)
    return ReadPlan(
        local=np.column_stack((local[begins, 0], lengths)),
        remote=np.column_stack((remote[begins, 0], lengths)),
    )


def by_remote_address(plan: ReadPlan) -> ReadPlan:
    """The same reads, in the order in which their remote spans lie in memory."""
    # To take a column out first makes the sort twice as fast, and ``take`` is many times faster
    # than an array as index.
    order = np.argsort(np.ascontiguousarray(plan.remote[:, 0]))
    return ReadPlan(local=plan.local.take(order, axis=0), remote=plan.remote.take(order, axis=0))


def join_neighbours(spans: SpanArray) -> SpanArray:
    """The same bytes in the same order, with rows joined that follow each other in memory."""
    if spans.shape[0] < 2:
        return spans
    after = 1 + np.flatnonzero(spans[1:, 0] - spans[:-1, 0] == spans[:-1, 1])
    if not after.size:
        return spans
    begins, lengths = _joined(spans[:, 1], after)
    return np.column_stack((spans[begins, 0], lengths))


def slice_plan(plan: ReadPlan, max_bytes: int, max_rows: int) -> Iterator[ReadPlan]:
    """Cut a plan into slices of at most ``max_bytes`` bytes and ``max_rows`` rows.

    Slices come in order, each as big as may be, and are made when they are asked for: of a plan
    with many rows the first one is there at once. A row is cut where a slice ends.
    """
    if max_bytes < 1 or max_rows < 1:
        raise _bad(f"max_bytes {max_bytes} and max_rows {max_rows} must be at least 1")
    return _slices(plan, max_bytes, max_rows)


def _slices(plan: ReadPlan, max_bytes: int, max_rows: int) -> Iterator[ReadPlan]:
    if 0 < plan.local.shape[0] <= max_rows and total_bytes(plan.local) <= max_bytes:
        yield plan
        return
    row_ends = np.cumsum(plan.local[:, 1])
    total = int(row_ends[-1]) if row_ends.size else 0
    done = 0
    while done < total:
        first = int(np.searchsorted(row_ends, np.uint64(done), side="right"))
        end = min(done + max_bytes, total)
        last = int(np.searchsorted(row_ends, np.uint64(end)))
        if last - first >= max_rows:
            last = first + max_rows - 1
            end = int(row_ends[last])
        rows = slice(first, last + 1)
        yield _trimmed(
            ReadPlan(local=plan.local[rows], remote=plan.remote[rows]),
            before=done - int(row_ends[first] - plan.local[first, 1]),
            after=int(row_ends[last]) - end,
        )
        done = end


def _trimmed(plan: ReadPlan, before: int, after: int) -> ReadPlan:
    """Without so many bytes of its first row, and of its last."""
    if not before and not after:
        return plan
    trimmed = ReadPlan(local=plan.local.copy(), remote=plan.remote.copy())
    for side in (trimmed.local, trimmed.remote):
        side[0, 0] += np.uint64(before)
        side[0, 1] -= np.uint64(before)
        side[-1, 1] -= np.uint64(after)
    return trimmed


def without_first(plan: ReadPlan, done_bytes: int) -> ReadPlan:
    """What is left of a plan whose first ``done_bytes`` bytes were moved."""
    row_ends = np.cumsum(plan.local[:, 1])
    row = int(np.searchsorted(row_ends, done_bytes, side="right"))
    left = ReadPlan(local=plan.local[row:], remote=plan.remote[row:])
    if row == row_ends.size:
        return left
    return _trimmed(left, before=done_bytes - int(row_ends[row] - plan.local[row, 1]), after=0)


def _joined(
    lengths: NDArray[np.uint64], after: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Rows that begin a joined one, and its length, if rows ``after`` go with those before."""
    begins = np.delete(np.arange(lengths.size), after)
    return begins, np.add.reduceat(lengths, begins)


def _sorted_bounds(spans: SpanArray) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Starts and ends, each sorted by itself: which belong together is not kept, and not needed
    to tell where rows overlap or leave gaps."""
    starts, lengths = np.sort(spans[:, 0]), spans[:, 1]
    if (lengths == lengths[0]).all():
        return starts, starts + lengths[0]
    return starts, np.sort(spans[:, 0] + lengths)


def _bad(message: str) -> RegistrationError:
    return RegistrationError(message, phase=Phase.REGISTER)
