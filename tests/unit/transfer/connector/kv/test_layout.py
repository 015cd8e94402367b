"""How a worker describes its KV memory, and what becomes of that on the wire."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Model, make_pool
from transfer.connector.kv.layout import MAX_LAYOUT_BYTES, KVLayout, LayerView, describe
from transfer.connector.kv.packing import Packing, cpu_packing, token_major
from transfer.connector.kv.pairing import block_spans_of
from transfer.errors import ConfigurationError, LayoutMismatch, ProtocolError

LAYOUTS = list(KVCacheLayout)


def span_list(spans: Any) -> list[tuple[int, int]]:
    return [(int(address), int(length)) for address, length in spans]


# ---- what is offered -----------------------------------------------------------------------------


@pytest.mark.parametrize("physical", LAYOUTS, ids=lambda layout: layout.name)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    kernels=st.integers(1, 3),
    tokens=st.integers(1, 4),
    num_blocks=st.integers(1, 5),
    data=st.data(),
)
def test_spans_are_exactly_the_bytes_of_the_blocks(
    physical: KVCacheLayout,
    layers: int,
    heads: int,
    kernels: int,
    tokens: int,
    num_blocks: int,
    data: st.DataObject,
) -> None:
    model = Model("tokens", layers, heads, head_size=2, dtype=torch.int16)
    pool = make_pool(
        model,
        physical,
        num_blocks=num_blocks,
        kernel_tokens=tokens,
        kernels_per_block=kernels,
    )
    ids = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True))

    spans = span_list(block_spans_of(pool.layout, ids))

    touched = [byte for address, length in spans for byte in range(address, address + length)]
    assert len(touched) == len(set(touched))
    assert set(touched) == {
        address
        for layer in pool.layers
        for block_id in ids
        for address in addresses_of(layer, block_id, kernels)
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


@pytest.mark.parametrize("stride", [1, 7, 1 << 20])
def test_stride_of_an_axis_of_one_means_nothing(stride: int) -> None:
    view = LayerView(4096, (6, 1, 4, 8), (64, stride, 16, 2), 2)
    layout = describe([view], PACKING, num_blocks=6, **{**SIZES, "total_heads": 1})

    assert span_list(block_spans_of(layout, [2])) == [(4096 + 128, 64)]


# ---- refusals ------------------------------------------------------------------------------------

VIEW = LayerView(4096, (6, 2, 4, 8), (128, 64, 16, 2), 2)
PACKING = token_major(16)
SIZES: dict[str, Any] = {
    "axes": "BHNC",
    "block_size": 4,
    "total_heads": 2,
    "rank": 0,
    "tp_size": 1,
}
SMALL = describe([VIEW, dataclasses.replace(VIEW, address=8192)], PACKING, num_blocks=6, **SIZES)


@pytest.mark.parametrize("block_ids", [[6], [0, 6], [-1], [1 << 40], [2, -1, 3]])
def test_block_outside_of_the_pool_is_refused(block_ids: list[int]) -> None:
    with pytest.raises(LayoutMismatch, match="outside the pool of 6 blocks"):
        block_spans_of(SMALL, block_ids)


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
        ([dataclasses.replace(VIEW, shape=(6, 4, 4, 8))], 6, 4, "4 head slots for the 2 KV heads"),
        ([dataclasses.replace(VIEW, shape=(6, 2, 4, 4))], 6, 4, "not 16 bytes in a row"),
        ([dataclasses.replace(VIEW, strides=(128, 64, 2, 8))], 6, 4, "not 16 bytes in a row"),
    ],
)
def test_tensors_that_cannot_be_described_are_refused(
    views: list[LayerView], num_blocks: int, block_size: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        describe(views, PACKING, num_blocks=num_blocks, **{**SIZES, "block_size": block_size})


def test_packings_of_the_cpu_need_a_heads_tokens_together() -> None:
    view = LayerView(4096, (6, 2, 4, 8), (128, 16, 32, 2), 2)

    with pytest.raises(ConfigurationError, match="order BNHC with packing cpu-vec"):
        describe([view], cpu_packing("vec", 4, 2), num_blocks=6, **{**SIZES, "axes": "BNHC"})


def test_a_packing_that_is_not_known_is_as_long_as_the_kernel_block() -> None:
    layout = describe([VIEW], Packing("new", ((1, 16),), 0), num_blocks=6, **SIZES)

    assert layout.granule == 4


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
    axes=st.sampled_from(["BHNC", "BNHC", "HBNC"]),
    kernel_stride=st.integers(1, 1 << 30),
    head_stride=st.integers(1, 1 << 30),
    token_stride=st.just(96),
    kernel_tokens=st.sampled_from([16, 32, 64]),
    kernels_per_block=st.integers(1, 4),
    num_blocks=st.integers(1, 1 << 20),
    packing=st.text(max_size=8),
    strips=st.sampled_from([((1, 96),), ((16, 4), (1, 32)), ((48, 2),)]),
    granule=st.sampled_from([1, 16]),
    total_heads=st.sampled_from([1, 2, 8, 64]),
    rank=st.integers(0, 7),
    tp_size=st.just(8),
    digest_base=st.just(1 << 40),
    digest_tokens=st.just(16),
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
    last = block_spans_of(layout, [layout.num_blocks - 1])
    assert int(last[:, 0].max()) < 1 << 62


IMPOSSIBLE: list[dict[str, Any]] = [
    {"num_blocks": float("inf")},
    {"num_blocks": float("nan")},
    {"num_blocks": 6.5},
    {"num_blocks": "6"},
    {"num_blocks": True},
    {"num_blocks": 0},
    {"num_blocks": 1 << 60},
    {"kernel_stride": 0},
    {"kernel_stride": -128},
    {"kernel_stride": 1 << 61},
    {"head_stride": 1 << 62},
    {"token_stride": 0},
    {"token_stride": 1 << 62},
    {"kernel_tokens": 0},
    {"kernels_per_block": 0},
    {"axes": "BHNN"},
    {"axes": "CBHN"},
    {"axes": 4},
    {"axes": "x" * 100},
    {"packing": None},
    {"strips": []},
    {"strips": [[1]]},
    {"strips": [[0, 16]]},
    {"strips": [[1, 1 << 62]]},
    {"strips": [[1 << 40, 1]]},
    {"strips": [[8, 1], [1, 9]]},
    {"strips": 3},
    {"granule": 0},
    {"granule": 3},
    {"granule": 8},
    {"total_heads": 0},
    {"total_heads": 3, "tp_size": 2},
    {"total_heads": 1 << 50},
    {"bases": "40968192"},
    {"bases": []},
    {"bases": [-1]},
    {"bases": [1 << 63]},
    {"bases": [[4096]]},
    {"bases": {"4096": 1}},
    {"rank": -1},
    {"rank": 1},
    {"tp_size": 0},
    {"digest_base": 4096},
    {"digest_tokens": 4},
    {"digest_base": 4096, "digest_tokens": 3},
    {"digest_base": -4096, "digest_tokens": 4},
    {"digest_base": 1 << 62, "digest_tokens": 4},
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
