"""The packings that Baton knows, against what vLLM's CPU attention really writes."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Model, make_pool
from transfer.connector.kv.packing import UNKNOWN_TOKENS, cpu_packing, token_major

CASES = [
    ("vec", torch.float32, 32),
    ("vec", torch.bfloat16, 64),
    ("vec16", torch.float32, 80),
    ("amx", torch.bfloat16, 64),
]


@pytest.mark.parametrize("tokens", [32, 64, 96])
@pytest.mark.parametrize(("isa", "dtype", "head_size"), CASES)
def test_blocks_that_vllm_wrote_are_read_token_by_token(
    isa: str, dtype: torch.dtype, head_size: int, tokens: int
) -> None:
    kind = "cpu-amx" if isa == "amx" else "cpu-vec"
    model = Model(kind, layers=1, heads=2, head_size=head_size, dtype=dtype)
    pool = make_pool(model, KVCacheLayout.LBHNC, num_blocks=3, kernel_tokens=tokens)
    content = torch.randn(2 * tokens, 2, 2 * head_size).to(dtype)
    (cache,) = pool.layers
    keys, values = cache.view(3, 2, 2 * tokens, head_size).chunk(2, dim=2)
    slots = torch.cat([torch.arange(tokens) + 2 * tokens, torch.arange(tokens)])
    ops.cpu_attn_reshape_and_cache(
        content[..., :head_size].contiguous(),
        content[..., head_size:].contiguous(),
        keys,
        values,
        slots,
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )

    assert torch.equal(pool.read([2, 0], 2 * tokens)[0], content)


@pytest.mark.parametrize(("isa", "dtype", "head_size"), CASES)
def test_strips_make_up_a_token(isa: str, dtype: torch.dtype, head_size: int) -> None:
    packing = cpu_packing(isa, head_size, dtype.itemsize)

    assert packing.token_bytes == token_major(2 * head_size * dtype.itemsize).token_bytes


@pytest.mark.parametrize("isa", ["neon", "vxe", "rvv", "something new"])
def test_a_packing_that_is_not_known_is_not_taken_apart(isa: str) -> None:
    packing = cpu_packing(isa, 64, 2)

    assert packing.granule == UNKNOWN_TOKENS
    assert packing.name == f"cpu-{isa}"
    assert packing.strips == ((1, 256),)
