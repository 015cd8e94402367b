"""Digests show every change of a block, wherever its bytes lie."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import CPU_LAYOUTS, Model, Pool, make_pool
from transfer.connector.kv.digests import BlockDigests, unit_tokens
from transfer.connector.kv.pairing import Stretch, digest_units
from transfer.errors import ConfigurationError

KINDS = ("tokens", "cpu-vec", "cpu-amx")
TOKENS = 83


def make(
    kind: str,
    physical: KVCacheLayout = KVCacheLayout.LBHNC,
    tokens: int = 32,
    **sizes: int,
) -> tuple[Pool, BlockDigests]:
    model = Model(kind, layers=2, heads=4, head_size=16, dtype=torch.int16)
    pool = make_pool(model, physical, num_blocks=9, kernel_tokens=tokens, **sizes)
    layout = dataclasses.replace(pool.layout, digest_tokens=unit_tokens(tokens))
    pool = dataclasses.replace(pool, layout=layout)
    return pool, BlockDigests(pool.layers, layout)


def units(pool: Pool, block_ids: list[int], first: int = 0) -> NDArray[np.int64]:
    size = pool.layout.block_size
    return digest_units(
        pool.layout, Stretch(first, TOKENS, block_ids[first // size :], first // size)
    )


def expected(kind: str) -> torch.Tensor:
    """The digests of the same prompt in one rank's memory of the plainest kind: [units, heads]."""
    pool, digests = make(kind)
    pool.write([0, 1, 2], pool.model.values(96))
    digests.write(units(pool, [0, 1, 2]))
    return digests.table[:6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [16, 32, 96])
@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_digests_depend_on_tokens_and_heads_alone(kind: str, tokens: int, tp_size: int) -> None:
    wanted = expected(kind)
    layouts = KVCacheLayout if kind == "tokens" else CPU_LAYOUTS
    for physical, rank in product(layouts, (0, tp_size - 1)):
        pool, digests = make(kind, physical, tokens, tp_size=tp_size, rank=rank)
        blocks = [7, 2, 5, 0, 8, 1][: -(-96 // tokens)]
        held = pool.layout.heads
        pool.write(blocks, pool.model.values(96)[:, :, held.first : held.stop])
        places = units(pool, blocks)
        digests.write(places)
        assert torch.equal(digests.table[places], wanted[:, held.first : held.stop])
        assert digests.agree(places)
        assert digests.agree(units(pool, blocks, first=tokens if tokens < 96 else 0))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(data=st.data())
def test_any_changed_bit_shows(kind: str, data: st.DataObject) -> None:
    pool, digests = make(kind)
    places = units(pool, [4, 6, 1])
    digests.write(places)
    layer = pool.layers[data.draw(st.integers(0, 1), "layer")]
    block = data.draw(st.sampled_from([4, 6]), "block")
    raw = layer.view(torch.uint8)[block].reshape(-1)
    before = raw.clone()
    for _ in range(data.draw(st.integers(1, 2), "bytes")):
        at = data.draw(st.integers(0, raw.numel() - 1), "byte")
        raw[at] ^= 1 << data.draw(st.integers(0, 7), "bit")

    # The second flip may have undone the first.
    assert digests.agree(places) is torch.equal(raw, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_bits_of_two_lanes_do_not_cancel_out(kind: str) -> None:
    pool, digests = make(kind)
    places = units(pool, [4, 6, 1])
    digests.write(places)
    raw = pool.layers[1].view(torch.uint8)[6].reshape(-1)
    raw[7] ^= 128
    raw[15] ^= 128

    assert not digests.agree(places)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_wrong_order_show(kind: str) -> None:
    pool, digests = make(kind)
    digests.write(units(pool, [4, 6, 1]))
    for layer in pool.layers:
        layer[[4, 6]] = layer[[6, 4]]

    assert not digests.agree(units(pool, [4, 6, 1]))
    assert digests.agree(units(pool, [4, 6, 1], first=64))


def test_blocks_that_nobody_asks_about_may_change() -> None:
    pool, digests = make("tokens")
    digests.write(units(pool, [4, 6, 1]))
    pool.layers[0][[0, 2, 3, 5, 7, 8]] = 99

    assert digests.agree(units(pool, [4, 6, 1]))


@pytest.mark.parametrize(("tokens", "unit"), [(16, 16), (64, 16), (8, 8), (24, 8), (1, 1)])
def test_units_divide_kernel_blocks(tokens: int, unit: int) -> None:
    assert unit_tokens(tokens) == unit


def test_memory_that_is_not_aligned_is_refused() -> None:
    model = Model("cpu-vec", layers=1, heads=1, head_size=2, dtype=torch.int16)
    pool = make_pool(model, KVCacheLayout.LBHNC, num_blocks=2, kernel_tokens=2)
    layout = dataclasses.replace(pool.layout, digest_tokens=2)

    with pytest.raises(ConfigurationError, match=r"transfer\.digests needs KV tensors"):
        BlockDigests(pool.layers, layout)
