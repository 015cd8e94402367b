"""Reads between ranks, block sizes and physical layouts, against a model that copies by token."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import CPU_LAYOUTS, Model, Pool, make_pool
from transfer.connector.kv.heads import HeadRange, parts_of
from transfer.connector.kv.layout import KVLayout, LayerView, describe
from transfer.connector.kv.packing import cpu_packing, token_major
from transfer.connector.kv.pairing import Stretch, block_spans_of, digest_units, plan_read
from transfer.errors import LayoutMismatch
from transfer.spans import coverage, lies_within, merge_adjacent
from transfer.types import ReadPlan

LAYOUTS = list(KVCacheLayout)


@dataclasses.dataclass(frozen=True)
class Side:
    """How one engine cuts and spreads its KV memory."""

    physical: KVCacheLayout
    tp_size: int
    kernel_tokens: int
    kernels_per_block: int

    @property
    def block_size(self) -> int:
        return self.kernel_tokens * self.kernels_per_block

    def pools(self, model: Model, num_blocks: int, seed: int) -> list[Pool]:
        return [
            make_pool(
                model,
                self.physical,
                num_blocks=num_blocks,
                kernel_tokens=self.kernel_tokens,
                kernels_per_block=self.kernels_per_block,
                rank=rank,
                tp_size=self.tp_size,
                seed=seed + rank,
            )
            for rank in range(self.tp_size)
        ]


@st.composite
def sides(draw: st.DrawFn, kind: str) -> Side:
    tokens = (16, 32) if kind == "cpu-amx" else (2, 4, 8)
    return Side(
        physical=draw(st.sampled_from(LAYOUTS if kind == "tokens" else CPU_LAYOUTS)),
        tp_size=draw(st.sampled_from((1, 2, 4, 8))),
        kernel_tokens=draw(st.sampled_from(tokens)),
        kernels_per_block=draw(st.integers(1, 2)),
    )


def carry_out(plan: ReadPlan) -> None:
    plan = merge_adjacent(plan)
    for (target, length), (source, _) in zip(plan.local, plan.remote, strict=True):
        ctypes.memmove(int(target), int(source), int(length))


@pytest.mark.parametrize("kind", ["tokens", "cpu-vec", "cpu-amx"])
@settings(max_examples=60)
@given(data=st.data())
def test_every_reader_rank_gets_its_heads_of_every_token(kind: str, data: st.DataObject) -> None:
    model = Model(
        kind,
        layers=data.draw(st.integers(1, 2), "layers"),
        heads=data.draw(st.sampled_from((1, 2, 4, 8)), "heads"),
        head_size=16 if kind == "cpu-amx" else 2,
        dtype=torch.int16,
    )
    owner, reader = data.draw(sides(kind), "owner"), data.draw(sides(kind), "reader")
    if kind != "tokens":
        reader = dataclasses.replace(reader, physical=_same_order(reader, owner))
    tokens = data.draw(st.integers(1, 3 * max(owner.block_size, reader.block_size)), "tokens")
    theirs = data.draw(st.permutations(range(14)), "theirs")[: -(-tokens // owner.block_size)]
    mine = data.draw(st.permutations(range(14)), "mine")[: -(-tokens // reader.block_size)]
    if len(theirs) * owner.block_size < tokens or len(mine) * reader.block_size < tokens:
        return
    cached = data.draw(st.integers(0, (tokens - 1) // reader.block_size), "cached blocks")
    first = cached * reader.block_size
    owners, readers = owner.pools(model, 14, seed=1), reader.pools(model, 14, seed=50)
    values = model.values(tokens)
    for pool in owners:
        held = pool.layout.heads
        pool.write(theirs, values[:, :, held.first : held.stop])

    for rank, pool in enumerate(readers):
        before = pool.copy()
        kept = pool.read(mine, first) if first else None
        into = Stretch(first, tokens, mine[cached:], cached)
        for part in parts_of(rank, reader.tp_size, owner.tp_size, model.heads):
            if not len(part.heads):
                continue
            remote = owners[part.owner_rank].layout
            plan = plan_read(pool.layout, into, remote, theirs, part.heads)
            assert lies_within(plan.remote, coverage(block_spans_of(remote, theirs)))
            carry_out(plan)
        held = pool.layout.heads
        wanted = values[:, first:, held.first : held.stop]
        assert torch.equal(pool.read(mine, tokens)[:, first:], wanted)
        if kept is not None:
            assert torch.equal(pool.read(mine, first), kept)
        others = [
            block * reader.kernels_per_block + nth
            for block in range(14)
            if block not in mine[cached:]
            for nth in range(reader.kernels_per_block)
        ]
        for old, new in zip(before, pool.layers, strict=True):
            assert torch.equal(old[others], new[others])


def _same_order(reader: Side, owner: Side) -> KVCacheLayout:
    """The CPU's packings cannot be turned round, so both sides need one order of axes."""
    if reader.physical.layer_view_order == owner.physical.layer_view_order:
        return reader.physical
    return owner.physical


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("owner_tp", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_every_pair_of_sizes(tp: int, owner_tp: int, heads: int) -> None:
    model = Model("tokens", layers=2, heads=heads, head_size=2, dtype=torch.int16)
    owner = Side(KVCacheLayout.LBNHC, owner_tp, 4, 1)
    reader = Side(KVCacheLayout.BLHNC, tp, 8, 1)
    values = model.values(22)
    owners, readers = owner.pools(model, 8, seed=1), reader.pools(model, 5, seed=50)
    for pool in owners:
        pool.write([5, 1, 6, 0, 7, 2], values[:, :, pool.layout.heads.first :])

    for rank, pool in enumerate(readers):
        for part in parts_of(rank, tp, owner_tp, heads):
            if len(part.heads):
                into = Stretch(0, 22, [3, 0, 4])
                remote = owners[part.owner_rank].layout
                carry_out(plan_read(pool.layout, into, remote, [5, 1, 6, 0, 7, 2], part.heads))
        held = pool.layout.heads
        assert torch.equal(pool.read([3, 0, 4], 22), values[:, :, held.first : held.stop])


# Contiguous runs in blocks 3 and 4 of 2 layers and 2 heads, in 3 kernel blocks each.
RUNS = {"LBHNC": 2, "LBNHC": 2, "LHBNC": 4, "BLHNC": 1, "BLNHC": 1, "BHLNC": 1}


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
def test_what_lies_together_is_one_row(physical: KVCacheLayout) -> None:
    model = Model("tokens", layers=2, heads=2, head_size=2, dtype=torch.int16)
    pool = make_pool(model, physical, num_blocks=6, kernel_tokens=4, kernels_per_block=3)
    other = make_pool(model, physical, num_blocks=3, kernel_tokens=4, kernels_per_block=3)

    plan = plan_read(pool.layout, Stretch(0, 24, [3, 4]), other.layout, [1, 2], pool.layout.heads)

    assert len(merge_adjacent(plan).local) == RUNS[physical.name]
    assert int(plan.local[:, 1].sum()) == 2 * pool.layout.block_bytes


def test_a_whole_block_of_the_cpu_is_one_row() -> None:
    model = Model("cpu-vec", layers=2, heads=3, head_size=32, dtype=torch.int16)
    one, other = (
        make_pool(model, KVCacheLayout.LBHNC, num_blocks=9, kernel_tokens=32) for _ in range(2)
    )

    plan = plan_read(
        one.layout, Stretch(0, 96, [4, 5, 1]), other.layout, [2, 3, 8], one.layout.heads
    )

    assert len(plan.local) == 2 * 3
    assert len(merge_adjacent(plan).local) == 2 * 2


# ---- digests -------------------------------------------------------------------------------------

DIGESTS: dict[str, Any] = {"digest_base": 1 << 20, "digest_tokens": 2}


def layouts(**changes: Any) -> tuple[KVLayout, KVLayout]:
    """A reader's of 4 tokens a block and an owner's of 8, with the same four heads."""
    view = LayerView(1 << 30, (6, 4, 4, 8), (256, 64, 16, 2), 2)
    reader = describe(
        [view],
        token_major(16),
        axes="BHNC",
        num_blocks=6,
        block_size=4,
        total_heads=8,
        rank=1,
        tp_size=2,
    )
    view = LayerView(1 << 31, (6, 8, 8, 8), (1024, 128, 16, 2), 2)
    owner = describe(
        [view],
        token_major(16),
        axes="BHNC",
        num_blocks=6,
        block_size=8,
        total_heads=8,
        rank=0,
        tp_size=1,
    )
    return dataclasses.replace(reader, **changes), owner


def test_digests_of_the_heads_that_are_read_come_along() -> None:
    reader, owner = layouts(**DIGESTS)
    owner = dataclasses.replace(owner, digest_base=1 << 21, digest_tokens=2)

    plan = plan_read(reader, Stretch(4, 10, [5, 2], 1), owner, [3, 0], HeadRange(5, 7))

    # Tokens 4 to 11 are units 2 and 3 of the owner's block 3, and 0 and 1 of its block 0.
    rows = plan.remote[:, 0] < 1 << 30
    assert plan.remote[rows].tolist() == [
        [(1 << 21) + 8 * ((3 * 4 + 2) * 8 + 5), 16],
        [(1 << 21) + 8 * ((3 * 4 + 3) * 8 + 5), 16],
        [(1 << 21) + 8 * ((0 * 4 + 0) * 8 + 5), 16],
        [(1 << 21) + 8 * ((0 * 4 + 1) * 8 + 5), 16],
    ]
    assert plan.local[rows].tolist() == [
        [(1 << 20) + 8 * ((5 * 2 + 0) * 4 + 1), 16],
        [(1 << 20) + 8 * ((5 * 2 + 1) * 4 + 1), 16],
        [(1 << 20) + 8 * ((2 * 2 + 0) * 4 + 1), 16],
        [(1 << 20) + 8 * ((2 * 2 + 1) * 4 + 1), 16],
    ]
    assert lies_within(plan.remote, coverage(block_spans_of(owner, [3, 0])))
    # Token 9 is the last: nobody asks for the unit of tokens 10 and 11.
    assert digest_units(reader, Stretch(4, 10, [5, 2], 1)).tolist() == [10, 11, 4]


@pytest.mark.parametrize("keeper", ["reader", "owner"])
def test_nothing_is_fetched_where_only_one_side_keeps_digests(keeper: str) -> None:
    reader, owner = layouts(**DIGESTS if keeper == "reader" else {})
    if keeper == "owner":
        owner = dataclasses.replace(owner, **DIGESTS)

    plan = plan_read(reader, Stretch(0, 8, [5, 2]), owner, [3], HeadRange(5, 7))

    assert int(plan.local[:, 1].sum()) == 8 * 2 * 16


def test_digests_of_different_units_are_refused() -> None:
    reader, owner = layouts(**DIGESTS)
    owner = dataclasses.replace(owner, digest_base=1 << 21, digest_tokens=4)

    with pytest.raises(LayoutMismatch, match="digests are of 4 tokens at the owner and of 2 here"):
        plan_read(reader, Stretch(0, 8, [5, 2]), owner, [3], HeadRange(5, 7))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_heads": 16}, "number of KV heads is 16 at the owner and 8 here"),
        ({"packing": "cpu-amx"}, "packing of keys and values is cpu-amx at the owner and tokens"),
        ({"strips": ((1, 32),)}, "bytes of a token is"),
        ({"bases": (4096, 8192)}, "the owner has 2 layers, this worker 1"),
        ({"kernel_tokens": 6}, "blocks of 6 tokens at the owner cannot become blocks of 4"),
        ({"rank": 0, "tp_size": 4}, "KV heads 5 to 6 are not all at the owner"),
    ],
)
def test_owners_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    reader, owner = layouts()

    with pytest.raises(LayoutMismatch, match=message):
        plan_read(
            reader,
            Stretch(0, 8, [5, 2]),
            dataclasses.replace(owner, **change),
            [3],
            HeadRange(5, 7),
        )


def test_packings_that_are_not_token_by_token_need_one_order_of_axes() -> None:
    view = LayerView(4096, (6, 1, 32, 64), (8192, 8192, 256, 4), 4)
    packed = describe(
        [view],
        cpu_packing("vec", 32, 4),
        axes="BHNC",
        num_blocks=6,
        block_size=32,
        total_heads=1,
        rank=0,
        tp_size=1,
    )
    other = dataclasses.replace(packed, axes="BNHC")

    with pytest.raises(LayoutMismatch, match="order BNHC at the owner and BHNC here"):
        plan_read(packed, Stretch(0, 8, [0]), other, [0], packed.heads)


def test_tiles_are_not_split() -> None:
    view = LayerView(4096, (6, 1, 32, 64), (4096, 4096, 128, 2), 2)
    tiled = describe(
        [view],
        cpu_packing("neon", 32, 2),
        axes="BHNC",
        num_blocks=6,
        block_size=32,
        total_heads=1,
        rank=0,
        tp_size=1,
    )
    half = dataclasses.replace(tiled, kernel_tokens=16, granule=16)

    with pytest.raises(LayoutMismatch, match="one must divide the other, in steps of 32"):
        plan_read(tiled, Stretch(0, 8, [0]), half, [0], tiled.heads)


@pytest.mark.parametrize(
    ("into", "theirs", "message"),
    [
        (Stretch(0, 8, [5, 6]), [3], "outside the pool of 6 blocks"),
        (Stretch(0, 8, [5, -1]), [3], "outside the pool of 6 blocks"),
        (Stretch(0, 8, [5, 2]), [1 << 40], "outside the pool of 6 blocks"),
        (Stretch(0, 8, [5]), [3], "1 blocks of 4 tokens, .* do not hold tokens 0 to 7"),
        (Stretch(0, 9, [5, 2, 1]), [3], "1 blocks of 8 tokens, .* do not hold tokens 0 to 8"),
        (Stretch(0, 8, [5, 2], 1), [3], "from block 1 of the prompt on, do not hold"),
        (Stretch(2, 8, [5, 2]), [3], "token 2 is not the first of 4 in a block"),
    ],
)
def test_blocks_that_are_missing_or_not_there(
    into: Stretch, theirs: list[int], message: str
) -> None:
    reader, owner = layouts()

    with pytest.raises(LayoutMismatch, match=message):
        plan_read(reader, into, owner, theirs, HeadRange(5, 7))
