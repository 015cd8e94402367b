from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from transfer.connector.layout import (
    MAX_LAYOUT_BYTES,
    KVLayout,
    LayerView,
    describe,
    plan_read,
)
from transfer.errors import ConfigurationError, LayoutMismatch, ProtocolError

LAYOUTS = list(KVCacheLayout)
DTYPES = (torch.uint8, torch.float16, torch.float32)


@dataclass(frozen=True)
class Pool:
    """KV tensors as vLLM lays them out, and the model that the layout is checked against."""

    layers: tuple[torch.Tensor, ...]
    num_blocks: int
    layout: KVLayout

    @property
    def kernel_blocks(self) -> int:
        return self.layers[0].shape[0] // self.num_blocks

    def block(self, block_id: int) -> torch.Tensor:
        """All bytes of a scheduler's block in logical order, by plain tensor indexing."""
        first = block_id * self.kernel_blocks
        rows = [layer[first : first + self.kernel_blocks] for layer in self.layers]
        return torch.stack(rows).contiguous().view(torch.uint8).clone()


@dataclass(frozen=True)
class Sizes:
    layers: int
    kernel_blocks: int
    heads: int
    tokens: int
    content: int
    dtype: torch.dtype


sizes = st.builds(
    Sizes,
    layers=st.integers(1, 3),
    kernel_blocks=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 4),
    content=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
)


def make_pool(physical: KVCacheLayout, size: Sizes, num_blocks: int, seed: int) -> Pool:
    """As vLLM does it: one allocation in physical order, seen through a logical permutation."""
    logical = (
        size.layers,
        num_blocks * size.kernel_blocks,
        size.heads,
        size.tokens,
        size.content,
    )
    order = physical.stride_order
    generator = torch.Generator().manual_seed(seed)
    itemsize = torch.empty(0, dtype=size.dtype).element_size()
    raw = torch.randint(
        0, 256, (math.prod(logical) * itemsize,), dtype=torch.uint8, generator=generator
    )
    base = raw.view(size.dtype).view([logical[axis] for axis in order])
    inverse = [order.index(axis) for axis in range(5)]
    layers = tuple(base.permute(inverse).unbind(0))
    layout = describe(
        [view_of(layer) for layer in layers],
        num_blocks=num_blocks,
        block_size=size.tokens * size.kernel_blocks,
        rank=0,
        tp_size=1,
    )
    return Pool(layers, num_blocks, layout)


def view_of(tensor: torch.Tensor) -> LayerView:
    blocks, heads, tokens, content = tensor.shape
    b, h, n, c = (stride * tensor.element_size() for stride in tensor.stride())
    return LayerView(
        tensor.data_ptr(), (blocks, heads, tokens, content), (b, h, n, c), tensor.element_size()
    )


def copy(pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    for (target, length), (source, source_length) in pairs:
        assert length == source_length
        ctypes.memmove(target, source, length)


def span_list(spans: Any) -> list[tuple[int, int]]:
    return [(int(address), int(length)) for address, length in spans]


# ---- against tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
@given(size=sizes, data=st.data())
def test_copying_the_spans_copies_the_blocks(
    physical: KVCacheLayout, size: Sizes, data: st.DataObject
) -> None:
    # Pools of different sizes; vLLM's have two blocks at the least, one of them its null block.
    owner_blocks = data.draw(st.integers(2, 6))
    reader_blocks = data.draw(st.integers(2, 6))
    count = data.draw(st.integers(0, min(owner_blocks, reader_blocks)))
    remote_ids = data.draw(st.permutations(range(owner_blocks)))[:count]
    local_ids = data.draw(st.permutations(range(reader_blocks)))[:count]
    owner = make_pool(physical, size, owner_blocks, seed=1)
    reader = make_pool(physical, size, reader_blocks, seed=2)
    expected = [reader.block(block_id) for block_id in range(reader_blocks)]
    for mine, theirs in zip(local_ids, remote_ids, strict=True):
        expected[mine] = owner.block(theirs)
    before = [owner.block(block_id) for block_id in range(owner_blocks)]

    plan = plan_read(reader.layout, local_ids, owner.layout, remote_ids)
    copy(list(zip(span_list(plan.local), span_list(plan.remote), strict=True)))

    for block_id in range(reader_blocks):
        assert torch.equal(reader.block(block_id), expected[block_id])
    for block_id in range(owner_blocks):
        assert torch.equal(owner.block(block_id), before[block_id])


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
@given(size=sizes, num_blocks=st.integers(1, 5), data=st.data())
def test_spans_are_exactly_the_bytes_of_the_blocks(
    physical: KVCacheLayout, size: Sizes, num_blocks: int, data: st.DataObject
) -> None:
    pool = make_pool(physical, size, num_blocks, seed=3)
    ids = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True))

    spans = span_list(pool.layout.spans(ids))

    touched = [byte for address, length in spans for byte in range(address, address + length)]
    assert len(touched) == len(set(touched))
    assert set(touched) == {
        address
        for layer in pool.layers
        for block_id in ids
        for address in addresses_of(layer, block_id, pool.kernel_blocks)
    }
    assert len(touched) == pool.layout.block_bytes * len(ids)


def addresses_of(layer: torch.Tensor, block_id: int, kernel_blocks: int) -> set[int]:
    """Every byte's address, element by element."""
    item = layer.element_size()
    found: set[int] = set()
    for block in range(block_id * kernel_blocks, (block_id + 1) * kernel_blocks):
        for head in range(layer.shape[1]):
            for token in range(layer.shape[2]):
                for index in range(layer.shape[3]):
                    offset = sum(
                        place * stride
                        for place, stride in zip(
                            (block, head, token, index), layer.stride(), strict=True
                        )
                    )
                    start = layer.data_ptr() + offset * item
                    found.update(range(start, start + item))
    return found


# Pieces per layer and scheduler's block that a transfer needs, for H=2, N=4, 3 kernel blocks each.
CHUNKS = {"LBHNC": 1, "LBNHC": 1, "LHBNC": 2, "BLHNC": 3, "BLNHC": 3, "BHLNC": 6}


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
def test_neighbouring_bytes_are_one_chunk(physical: KVCacheLayout) -> None:
    size = Sizes(layers=2, kernel_blocks=3, heads=2, tokens=4, content=5, dtype=torch.float16)
    layout = make_pool(physical, size, num_blocks=4, seed=4).layout
    layer_bytes = 3 * 2 * 4 * 5 * 2

    assert len(layout.chunk_offsets) == CHUNKS[physical.name]
    assert layout.chunk_bytes == layer_bytes // CHUNKS[physical.name]
    assert layout.block_bytes == 2 * layer_bytes
    assert layout.block_size == 12


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
def test_axes_of_one_do_not_split_chunks(physical: KVCacheLayout) -> None:
    size = Sizes(layers=1, kernel_blocks=1, heads=1, tokens=4, content=5, dtype=torch.float32)
    layout = make_pool(physical, size, num_blocks=3, seed=5).layout

    assert layout.chunk_offsets == (0,)
    assert layout.chunk_bytes == 4 * 5 * 4


@pytest.mark.parametrize("stride", [0, 7, 1 << 20])
def test_stride_of_an_axis_of_one_means_nothing(stride: int) -> None:
    view = LayerView(4096, (6, 1, 4, 8), (64, stride, 16, 2), 2)
    layout = describe([view], num_blocks=6, block_size=4, rank=0, tp_size=1)

    assert (layout.chunk_offsets, layout.chunk_bytes) == ((0,), 64)


@given(size=sizes, num_blocks=st.integers(1, 4), data=st.data())
def test_layouts_that_cut_blocks_alike_but_elsewhere_can_be_paired(
    size: Sizes, num_blocks: int, data: st.DataObject
) -> None:
    # Layers in one allocation or interleaved per block: the same block, at other strides.
    one, other = data.draw(
        st.sampled_from(
            [
                (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC),
                (KVCacheLayout.LBNHC, KVCacheLayout.BLNHC),
            ]
        )
    )
    owner = make_pool(one, dataclasses.replace(size, kernel_blocks=1), num_blocks, seed=6)
    reader = make_pool(other, dataclasses.replace(size, kernel_blocks=1), num_blocks, seed=7)
    ids = list(range(num_blocks))

    plan = plan_read(reader.layout, ids, owner.layout, ids[::-1])
    copy(list(zip(span_list(plan.local), span_list(plan.remote), strict=True)))

    for block_id in ids:
        assert torch.equal(reader.block(block_id), owner.block(ids[::-1][block_id]))


def test_spans_go_layer_by_layer_block_by_block_chunk_by_chunk() -> None:
    layout = KVLayout(
        bases=(1000, 5000),
        block_stride=100,
        chunk_offsets=(0, 40),
        chunk_bytes=8,
        num_blocks=3,
        block_size=16,
        rank=0,
        tp_size=1,
    )

    assert span_list(layout.spans([2, 0])) == [
        (1200, 8),
        (1240, 8),
        (1000, 8),
        (1040, 8),
        (5200, 8),
        (5240, 8),
        (5000, 8),
        (5040, 8),
    ]
    assert layout.spans([]).shape == (0, 2)


# ---- refusals ------------------------------------------------------------------------------------

VIEW = LayerView(4096, (6, 2, 4, 8), (128, 64, 16, 2), 2)
SMALL = describe([VIEW, dataclasses.replace(VIEW, address=8192)], num_blocks=6, block_size=4,
                 rank=0, tp_size=1)  # fmt: skip


@pytest.mark.parametrize("block_ids", [[6], [0, 6], [-1], [1 << 40], [2, -1, 3]])
def test_block_outside_of_the_pool_is_refused(block_ids: list[int]) -> None:
    with pytest.raises(LayoutMismatch, match="outside the pool of 6 blocks"):
        SMALL.spans(block_ids)


@pytest.mark.parametrize(
    ("views", "num_blocks", "block_size", "message"),
    [
        ([], 6, 4, "no KV cache tensors"),
        ([VIEW, dataclasses.replace(VIEW, shape=(6, 2, 4, 9))], 6, 4, "different shapes"),
        ([VIEW, dataclasses.replace(VIEW, strides=(64, 384, 16, 2))], 6, 4, "different shapes"),
        ([VIEW, dataclasses.replace(VIEW, itemsize=1)], 6, 4, "different shapes"),
        ([VIEW], 4, 4, "KV tensors of 6 blocks for a pool of 4"),
        ([VIEW], 12, 4, "KV tensors of 6 blocks for a pool of 12"),
        ([VIEW], 6, 16, "1 kernel blocks of 4 tokens for blocks of 16"),
        ([VIEW], 3, 4, "2 kernel blocks of 4 tokens for blocks of 4"),
    ],
)
def test_tensors_that_cannot_be_described_are_refused(
    views: list[LayerView], num_blocks: int, block_size: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        describe(views, num_blocks=num_blocks, block_size=block_size, rank=0, tp_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 8}, "block_size is 8 at the owner and 4 here"),
        ({"tp_size": 2}, "tp_size is 2 at the owner and 1 here"),
        ({"rank": 1}, "rank is 1 at the owner and 0 here"),
        ({"chunk_bytes": 64}, "chunk_bytes is 64 at the owner and 128 here"),
        ({"bases": (4096,)}, "layers or chunks per block differ"),
        ({"chunk_offsets": (0, 64)}, "layers or chunks per block differ"),
    ],
)
def test_peer_that_cuts_blocks_differently_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        plan_read(SMALL, [0], dataclasses.replace(SMALL, **change), [0])


@pytest.mark.parametrize("remote_ids", [[], [1], [1, 2, 3]])
def test_numbers_of_blocks_must_agree(remote_ids: list[int]) -> None:
    with pytest.raises(LayoutMismatch, match=f"{len(remote_ids)} blocks offered for 2 places"):
        plan_read(SMALL, [0, 1], SMALL, remote_ids)


def test_pools_may_differ_in_size_and_place() -> None:
    bigger = dataclasses.replace(SMALL, bases=(1 << 40, 1 << 41), num_blocks=100)

    plan = plan_read(SMALL, [5], bigger, [99])

    assert span_list(plan.local) == [(4096 + 5 * 128, 128), (8192 + 5 * 128, 128)]
    assert span_list(plan.remote) == [((1 << 40) + 99 * 128, 128), ((1 << 41) + 99 * 128, 128)]


# ---- on the wire ---------------------------------------------------------------------------------

WIRE: dict[str, Any] = json.loads(SMALL.encode())


def decoded(raw: bytes) -> KVLayout | ProtocolError:
    try:
        return KVLayout.decode(raw)
    except ProtocolError as error:
        return error


layouts = st.builds(
    KVLayout,
    bases=st.lists(st.integers(0, 1 << 50), min_size=1, max_size=5).map(tuple),
    block_stride=st.integers(1, 1 << 30),
    chunk_offsets=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5).map(tuple),
    chunk_bytes=st.integers(1, 1 << 30),
    num_blocks=st.integers(1, 1 << 20),
    block_size=st.integers(1, 1 << 20),
    rank=st.integers(0, 7),
    tp_size=st.just(8),
)


@given(layouts)
def test_layout_round_trip(layout: KVLayout) -> None:
    assert KVLayout.decode(layout.encode()) == layout


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    assert isinstance(decoded(raw), ProtocolError)


numbers = st.integers() | st.sampled_from([0, 1, 1 << 61, 1 << 62, 1 << 64, 10**30])
wire_values = numbers | st.floats() | st.booleans() | st.none() | st.text(max_size=4)
changes = st.dictionaries(
    st.sampled_from(sorted(WIRE)),
    wire_values | st.lists(wire_values, max_size=3) | st.dictionaries(st.text(max_size=3), numbers),
    max_size=4,
)


@given(changes)
def test_layout_with_changes_is_refused_or_within_an_address_space(change: dict[str, Any]) -> None:
    layout = decoded(json.dumps({**WIRE, **change}).encode())

    if isinstance(layout, ProtocolError):
        return
    assert json.loads(layout.encode()) == {**WIRE, **change}
    last = layout.spans([layout.num_blocks - 1])
    assert int(last[:, 0].max()) == (
        max(layout.bases)
        + (layout.num_blocks - 1) * layout.block_stride
        + max(layout.chunk_offsets)
    )


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_blocks": float("inf")},
    {"num_blocks": float("nan")},
    {"num_blocks": 6.5},
    {"num_blocks": "6"},
    {"num_blocks": True},
    {"num_blocks": 0},
    {"num_blocks": 1 << 60},
    {"block_stride": 0},
    {"block_stride": -128},
    {"block_stride": 1 << 61},
    {"chunk_bytes": 0},
    {"chunk_bytes": 1 << 62},
    {"block_size": 0},
    {"bases": "40968192"},
    {"bases": []},
    {"bases": [-1]},
    {"bases": [1 << 63]},
    {"bases": [[4096]]},
    {"bases": {"4096": 1}},
    {"chunk_offsets": []},
    {"chunk_offsets": [-8]},
    {"rank": -1},
    {"rank": 1},
    {"tp_size": 0},
]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff\xfe", id="not text"),
        pytest.param(b"[" * 200_000, id="deeply nested"),
        pytest.param(b'{"bases": [' + b"9" * 5000 + b"]}", id="number of 5000 digits"),
        pytest.param(SMALL.encode() + b" " * MAX_LAYOUT_BYTES, id="too long"),
        *(
            pytest.param(json.dumps({**WIRE, **change}).encode(), id=str(change))
            for change in IMPOSSIBLE
        ),
        *(
            pytest.param(
                json.dumps({name: WIRE[name] for name in WIRE if name != missing}).encode(),
                id=f"no {missing}",
            )
            for missing in WIRE
        ),
    ],
)
def test_malformed_layout_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        KVLayout.decode(raw)
