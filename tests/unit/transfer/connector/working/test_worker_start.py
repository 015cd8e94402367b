"""A worker is whole when it is there, and one that cannot start leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import make_pool
from tests.support.connector.staged_memory import BLOCK, MODEL
from tests.support.transfers.engines import Directory
from transfer.connector.memory.kv_memory import KVMemory
from transfer.connector.memory.kv_ranges import KVRange
from transfer.connector.settings import ConnectorSettings
from transfer.connector.working import start
from transfer.connector.working.block_path import BlockPath
from transfer.connector.working.direct import Direct
from transfer.connector.working.in_place import InPlace
from transfer.connector.working.staged import Staged
from transfer.errors import PeerUnreachable, Phase

NUM_BLOCKS = 8
CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(
        max_model_len=2 * BLOCK, get_total_num_kv_heads=lambda: MODEL.heads
    ),
    cache_config=SimpleNamespace(block_size=BLOCK),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    kv_transfer_config=SimpleNamespace(
        engine_id="engine-a", kv_role="kv_both", is_kv_producer=True, is_kv_consumer=True
    ),
)


class NobodyAnswers(Directory):
    def ready(self, timeout_s: float) -> None:
        raise PeerUnreachable(f"not in {timeout_s} s", phase=Phase.DISCOVER)


@pytest.fixture
def kv_caches(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    # vLLM would have to hold a model to say these.
    monkeypatch.setattr("transfer.connector.memory.kv_memory.packing_of", lambda *_: MODEL.packing)
    monkeypatch.setattr(start, "backend_names", lambda _: ["CPU_ATTN"])
    monkeypatch.setattr(start, "layout_hash", lambda *_, **__: "e" * 64)
    monkeypatch.setattr(start, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(start, "make_discovery", lambda _: NobodyAnswers())
    pool = make_pool(MODEL, KVCacheLayout.LBHNC, num_blocks=NUM_BLOCKS, kernel_tokens=BLOCK)
    return {f"layer {number}": tensor for number, tensor in enumerate(pool.layers)}


@pytest.mark.parametrize(
    ("staging", "kind"), [("auto", Direct), ("never", InPlace), ("always", Staged)]
)
def test_a_worker_that_cannot_start_leaves_nothing_behind(
    kv_caches: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    staging: str,
    kind: type[BlockPath],
) -> None:
    paths: list[BlockPath] = []
    ranges: list[KVRange] = []
    closed: list[object] = []
    threads = set(threading.enumerate())
    close = kind.close

    def close_and_say_so(path: BlockPath) -> None:
        closed.append(path)
        close(path)

    def path_of(memory: KVMemory, name: str, on_end: Callable[[], None]) -> BlockPath:
        paths.append(start.block_path_of(memory, name, on_end))
        ranges.extend(memory.ranges)
        return paths[-1]

    monkeypatch.setattr(kind, "close", close_and_say_so)
    monkeypatch.setattr(KVRange, "close", lambda kv_range: closed.append(kv_range))
    monkeypatch.setattr(NobodyAnswers, "close", lambda discovery: closed.append(NobodyAnswers))
    settings = ConnectorSettings(host_staging=staging)
    with pytest.raises(PeerUnreachable):
        start.start_worker(CONFIG, NUM_BLOCKS, settings, kv_caches, path_of)

    assert [type(path) for path in paths] == [kind]
    assert ranges
    assert closed == [*paths, NobodyAnswers, *reversed(ranges)]
    assert set(threading.enumerate()) == threads
