"""What a worker registers: its KV cache, or slots in host memory in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Model, Pool, make_pool
from transfer.connector.block_settings import read_transfer
from transfer.connector.memory.kv_memory import KVMemory
from transfer.connector.memory.kv_ranges import KVRange
from transfer.connector.settings import ConnectorSettings
from transfer.errors import ConfigurationError

MODEL = Model("tokens", layers=2, heads=3, head_size=16, dtype=torch.int16)
NUM_BLOCKS, BLOCK, PROMPT_BLOCKS = 50, 16, 7


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    # vLLM would have to hold a model to tell which attention backend it uses.
    monkeypatch.setattr("transfer.connector.memory.kv_memory.packing_of", lambda *_: MODEL.packing)
    return make_pool(MODEL, KVCacheLayout.LBNHC, num_blocks=NUM_BLOCKS, kernel_tokens=BLOCK)


def make_memory(
    pool: Pool, *, both: bool = False, staging: str = "always", **transfer: Any
) -> KVMemory:
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=PROMPT_BLOCKS * BLOCK - 1, get_total_num_kv_heads=lambda: MODEL.heads
        ),
        cache_config=SimpleNamespace(block_size=BLOCK),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        kv_transfer_config=SimpleNamespace(is_kv_producer=True, is_kv_consumer=both),
    )
    engine, blocks = read_transfer(transfer)
    settings = ConnectorSettings(host_staging=staging, transfer=engine, blocks=blocks)
    caches = {f"layer {number}": tensor for number, tensor in enumerate(pool.layers)}
    # Layers may share a tensor.
    caches["last"] = pool.layers[-1]
    return KVMemory(vllm_config, settings, caches, NUM_BLOCKS, rank=0)


def test_memory_of_the_host_is_read_as_it_is(pool: Pool) -> None:
    memory = make_memory(pool, staging="auto")

    assert (memory.host_blocks, memory.digests, memory.num_slots) == (None, None, 0)
    assert memory.layout == pool.layout
    storage = pool.layers[0].untyped_storage()
    assert memory.ranges == [KVRange(storage.data_ptr(), storage.nbytes())]
    assert not memory.in_place


def test_memory_that_is_never_staged_is_waited_for(pool: Pool) -> None:
    memory = make_memory(pool, staging="never")

    assert memory.in_place
    assert (memory.host_blocks, memory.num_slots) == (None, 0)
    assert memory.layout == pool.layout


def test_readers_are_shown_slots_of_the_same_form(pool: Pool) -> None:
    memory = make_memory(pool, digests=True)

    assert memory.host_blocks is not None
    assert memory.digests is not None
    assert memory.num_slots == memory.layout.num_blocks == 4 * PROMPT_BLOCKS
    assert memory.layout.axes == pool.layout.axes
    assert memory.layout.block_bytes == pool.layout.block_bytes
    assert memory.layout.bases == tuple(item.data_ptr() for item in memory.host_blocks.tensors)
    assert memory.layout.digest_base == memory.digests.memory[0]
    slot_bytes = 4 * PROMPT_BLOCKS * pool.layout.block_bytes // MODEL.layers
    assert not memory.in_place
    assert {(kv_range.address, kv_range.length) for kv_range in memory.ranges} == {
        *((base, slot_bytes) for base in memory.layout.bases),
        memory.digests.memory,
    }


@pytest.mark.parametrize(("both", "prompts"), [(False, 1), (True, 2)])
def test_the_setting_bounds_them(pool: Pool, both: bool, prompts: int) -> None:
    least = prompts * PROMPT_BLOCKS * pool.layout.block_bytes

    assert make_memory(pool, both=both, host_staging_bytes=least).num_slots == prompts * 7
    with pytest.raises(ConfigurationError, match=f"; {least} would do"):
        make_memory(pool, both=both, host_staging_bytes=least - 1)
