"""Which of the owner's bytes belong where in the reader's memory. Pure numpy.

Both sides cut a prompt into kernel blocks, perhaps of different sizes. The smaller of the two is
the *piece* in which bytes are paired: it lies within one kernel block on either side::

    owner, 64 tokens    |      0       |      1       |
    reader, 32 tokens   |   0   |   1  |   2   |   3  |
    pieces              |   0   |   1  |   2   |   3  |

One piece of one layer is a few *rows*, each contiguous on both sides: all of it if the two sides
cut it alike, one for every head, strip or token where they do not. No Python loop per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transfer.connector.kv.heads import HeadRange
from transfer.connector.kv.layout import DIGEST_BYTES, KVLayout
from transfer.connector.kv.packing import TOKENS
from transfer.errors import LayoutMismatch, Phase
from transfer.spans import concat
from transfer.types import ReadPlan, SpanArray

_Numbers = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens of one prompt, and the blocks of one side that hold them.

    Attributes:
        first_token: where to begin; the first token of a piece.
        stop_token: where to end; the piece that this lies in is meant as a whole.
        block_ids: blocks that follow each other in the prompt.
        first_block: number within the prompt of ``block_ids[0]``.
    """

    first_token: int
    stop_token: int
    block_ids: Sequence[int]
    first_block: int = 0


def check_translatable(local: KVLayout, remote: KVLayout) -> None:
    """Whether blocks of ``remote`` can become blocks of ``local``.

    Raises:
        LayoutMismatch: they cannot; says why.
    """
    for name, said in (
        ("total_heads", "the model's number of KV heads"),
        ("packing", "the packing of keys and values"),
        ("strips", "the bytes of a token"),
    ):
        ours, theirs = getattr(local, name), getattr(remote, name)
        if ours != theirs:
            raise _mismatch(f"{said} is {theirs} at the owner and {ours} here; it must be equal")
    if len(local.bases) != len(remote.bases):
        raise _mismatch(f"the owner has {len(remote.bases)} layers, this worker {len(local.bases)}")
    if local.packing != TOKENS and local.axes != remote.axes:
        raise _mismatch(
            f"axes are in order {remote.axes} at the owner and {local.axes} here, which packing "
            f"{local.packing} does not allow"
        )
    small, large = sorted((local.kernel_tokens, remote.kernel_tokens))
    granule = max(local.granule, remote.granule)
    if large % small or small % granule:
        raise _mismatch(
            f"blocks of {remote.kernel_tokens} tokens at the owner cannot become blocks of "
            f"{local.kernel_tokens}: one must divide the other"
            + (f", in steps of {granule}" if granule > 1 else "")
        )


def plan_read(
    local: KVLayout, into: Stretch, remote: KVLayout, block_ids: Sequence[int], heads: HeadRange
) -> ReadPlan:
    """Pairs the owner's bytes of some tokens and KV heads with ours.

    Where both sides keep digests, the owner's of these tokens and heads come along.

    Args:
        into: the tokens, and our blocks for them.
        block_ids: the owner's blocks, from the beginning of the prompt.
        heads: both sides must hold them.

    Raises:
        LayoutMismatch: the two sides do not fit together, or blocks are missing; says how.
    """
    check_translatable(local, remote)
    for side, layout in (("the owner", remote), ("this worker", local)):
        if heads not in layout.heads:
            raise _mismatch(f"KV heads {heads.first} to {heads.stop - 1} are not all at {side}")
    piece = min(local.kernel_tokens, remote.kernel_tokens)
    if into.first_token % piece:
        raise _mismatch(f"token {into.first_token} is not the first of {piece} in a block")
    out_of = Stretch(into.first_token, into.stop_token, block_ids)
    here, there = _pieces(local, into, piece), _pieces(remote, out_of, piece)
    rows = _rows(local, remote, heads, piece)
    order = _outermost_first(local)
    plan = ReadPlan(
        local=_spans(local, here, rows.local, rows.local_step, rows.length, order),
        remote=_spans(remote, there, rows.remote, rows.remote_step, rows.length, order),
    )
    if not local.digest_base or not remote.digest_base:
        return plan
    if local.digest_tokens != remote.digest_tokens or piece % local.digest_tokens:
        raise _mismatch(
            f"digests are of {remote.digest_tokens} tokens at the owner and of "
            f"{local.digest_tokens} here, and blocks are paired by {piece}"
        )
    return ReadPlan(
        local=concat([plan.local, _digest_spans(local, here, heads)]),
        remote=concat([plan.remote, _digest_spans(remote, there, heads)]),
    )


def block_spans_of(layout: KVLayout, block_ids: Sequence[int]) -> SpanArray:
    """Every byte of some blocks, digests included: what an owner offers.

    Raises:
        LayoutMismatch: an id lies outside the pool.
    """
    everything = Stretch(0, len(block_ids) * layout.block_size, block_ids)
    return plan_read(layout, everything, layout, block_ids, layout.heads).remote


def digest_units(layout: KVLayout, stretch: Stretch) -> NDArray[np.int64]:
    """Numbers of the digest units that begin within a stretch, ``[n]``; each has one digest for
    every KV head, and unit ``n`` is in kernel block ``n // layout.digest_units``.

    Raises:
        LayoutMismatch: blocks are missing or lie outside the pool.
    """
    return _units(layout, _pieces(layout, stretch, layout.digest_tokens)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Where one side has its pieces: arrays ``[pieces]``.

    Attributes:
        kernel: the kernel block of each.
        nth: its number within that.
        tokens: of one piece.
    """

    kernel: _Numbers
    nth: _Numbers
    tokens: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """The contiguous runs of one piece in one layer; arrays ``[rows]``, in bytes.

    The ``n``-th piece of a kernel block begins ``n * step`` further on, row by row.
    """

    local: _Numbers
    local_step: _Numbers
    remote: _Numbers
    remote_step: _Numbers
    length: _Numbers


def _rows(local: KVLayout, remote: KVLayout, heads: HeadRange, piece: int) -> _Rows:
    width = np.repeat(
        np.asarray([width for _, width in local.strips], dtype=np.uint64),
        [count for count, _ in local.strips],
    )
    start = np.cumsum(width) - width
    in_a_row = all(side.token_stride == side.token_bytes for side in (local, remote))
    # [heads, strips, runs of tokens]
    tokens = np.arange(1 if in_a_row else piece, dtype=np.uint64)[None, None, :]
    run = piece if in_a_row else 1
    length = np.broadcast_to(
        width[None, :, None] * np.uint64(run), (len(heads), width.size, tokens.size)
    )

    def places(side: KVLayout) -> tuple[_Numbers, _Numbers]:
        numbers = np.arange(heads.first, heads.stop, dtype=np.uint64) - np.uint64(side.heads.first)
        head = (numbers * np.uint64(side.head_stride))[:, None, None]
        strip = (start * np.uint64(side.kernel_tokens))[None, :, None]
        per_token = (width if in_a_row else width * 0 + np.uint64(side.token_stride))[None, :, None]
        offset = head + strip + tokens * np.uint64(side.token_stride)
        # A kernel block of one piece has no second one; a step would only keep rows apart.
        step = per_token * np.uint64(piece if side.kernel_tokens > piece else 0)
        return (
            np.broadcast_to(offset, length.shape).reshape(-1),
            np.broadcast_to(step, length.shape).reshape(-1),
        )

    here, here_step = places(local)
    there, there_step = places(remote)
    return _merged(_Rows(here, here_step, there, there_step, length.reshape(-1)))


def _merged(rows: _Rows) -> _Rows:
    """Rows that follow each other on both sides, and go on alike from piece to piece, joined."""
    order = np.argsort(rows.local, kind="stable")
    here, there, length = rows.local[order], rows.remote[order], rows.length[order]
    steps = [rows.local_step[order], rows.remote_step[order]]
    follows = (here[1:] == here[:-1] + length[:-1]) & (there[1:] == there[:-1] + length[:-1])
    for step in steps:
        follows &= step[1:] == step[:-1]
    begins = np.flatnonzero(np.concatenate(([True], ~follows)))
    return _Rows(
        here[begins],
        steps[0][begins],
        there[begins],
        steps[1][begins],
        np.add.reduceat(length, begins),
    )


def _pieces(layout: KVLayout, stretch: Stretch, piece: int) -> _Pieces:
    """Where one side has the pieces of a stretch."""
    ids = np.asarray(stretch.block_ids, dtype=np.int64)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= layout.num_blocks):
        raise _mismatch(f"a block id lies outside the pool of {layout.num_blocks} blocks")
    tokens = piece * np.arange(
        stretch.first_token // piece, -(-stretch.stop_token // piece), dtype=np.int64
    )
    number, within = np.divmod(tokens, layout.block_size)
    number -= stretch.first_block
    if number.size and (int(number.min()) < 0 or int(number.max()) >= ids.size):
        raise _mismatch(
            f"{ids.size} blocks of {layout.block_size} tokens, from block {stretch.first_block} of "
            f"the prompt on, do not hold tokens {stretch.first_token} to {stretch.stop_token - 1}"
        )
    kernel = ids[number] * layout.kernels_per_block + within // layout.kernel_tokens
    nth = within % layout.kernel_tokens // piece
    return _Pieces(kernel.astype(np.uint64), nth.astype(np.uint64), piece)


def _spans(
    layout: KVLayout,
    at: _Pieces,
    offset: _Numbers,
    step: _Numbers,
    length: _Numbers,
    order: tuple[int, ...],
) -> SpanArray:
    """``[layers * pieces * rows, 2]``; ``order`` says which of these three axes goes first."""
    bases = np.asarray(layout.bases, dtype=np.uint64)[:, None, None]
    blocks = (at.kernel * np.uint64(layout.kernel_stride))[None, :, None]
    rows = (offset[None, :] + at.nth[:, None] * step[None, :])[None, :, :]
    addresses = bases + blocks + rows
    lengths = np.broadcast_to(length, addresses.shape)
    spans = np.empty((addresses.size, 2), dtype=np.uint64)
    spans[:, 0] = addresses.transpose(order).reshape(-1)
    spans[:, 1] = lengths.transpose(order).reshape(-1)
    return spans


def _digest_spans(layout: KVLayout, at: _Pieces, heads: HeadRange) -> SpanArray:
    """``[pieces * units, 2]``: one row for each unit, with the digests of all ``heads``."""
    units = _units(layout, at).astype(np.uint64)
    held = layout.heads
    spans = np.empty((units.size, 2), dtype=np.uint64)
    spans[:, 0] = np.uint64(layout.digest_base) + np.uint64(DIGEST_BYTES) * (
        units * np.uint64(len(held)) + np.uint64(heads.first - held.first)
    )
    spans[:, 1] = len(heads) * DIGEST_BYTES
    return spans


def _units(layout: KVLayout, at: _Pieces) -> _Numbers:
    """Numbers of the units that pieces consist of, ``[pieces * units]``."""
    each = at.tokens // layout.digest_tokens
    first = at.kernel * np.uint64(layout.digest_units) + at.nth * np.uint64(each)
    return (first[:, None] + np.arange(each, dtype=np.uint64)[None, :]).reshape(-1)


def _outermost_first(layout: KVLayout) -> tuple[int, ...]:
    """The axes layers (0), pieces (1) and rows (2) as they lie in memory, so that neighbours
    follow each other and can be joined."""
    bases = layout.bases
    layer_stride = abs(bases[1] - bases[0]) if len(bases) > 1 else 0
    head_stride = layout.head_stride if len(layout.heads) > 1 else 0
    strides = (layer_stride, layout.kernel_stride, head_stride)
    return tuple(sorted(range(3), key=lambda axis: (-strides[axis], axis)))


def _mismatch(message: str) -> LayoutMismatch:
    return LayoutMismatch(message, phase=Phase.READ)
