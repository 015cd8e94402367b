"""A KV cache with slots, whose copies a test can hold up or let fail."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Model, make_pool, view_of
from transfer.connector.kv.digests import BlockDigests, unit_tokens
from transfer.connector.kv.layout import KVLayout, describe
from transfer.connector.memory.host_blocks import HostBlocks

MODEL = Model("tokens", layers=2, heads=3, head_size=16, dtype=torch.int16)
BLOCK = 16


class HeldBlocks(HostBlocks):
    """Slots whose copies wait for ``go``, which is set at first, and raise ``error`` if it is one.

    ``began`` is set by every copy that begins; ``steps`` has how many blocks each copied.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int, num_slots: int) -> None:
        super().__init__(tensors, num_blocks, num_slots)
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()
        self.error: Exception | None = None
        self.steps: list[int] = []

    def hold(self) -> None:
        """Lets no copy go on from now on."""
        self.go.clear()
        self.began.clear()

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        self._wait_for_test(len(slots))
        super().save(block_ids, slots)

    def load(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        self._wait_for_test(len(slots))
        super().load(block_ids, slots)

    def _wait_for_test(self, count: int) -> None:
        self.began.set()
        if not self.go.wait(20):
            raise TimeoutError("the test never let the copy go on")
        if self.error is not None:
            raise self.error
        self.steps.append(count)


class StagedMemory:
    """One rank's KV cache of ``num_blocks`` blocks, its slots and their digests."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.pool = make_pool(
            MODEL, KVCacheLayout.LBHNC, num_blocks=num_blocks, kernel_tokens=BLOCK
        )
        self.blocks = HeldBlocks(self.pool.layers, num_blocks, num_slots)
        layout = dataclasses.replace(self._layout(num_slots), digest_tokens=unit_tokens(BLOCK))
        self.digests = BlockDigests(self.blocks.tensors, layout)
        self.layout = dataclasses.replace(layout, digest_base=self.digests.memory[0])

    def _layout(self, num_slots: int) -> KVLayout:
        return describe(
            [view_of(tensor) for tensor in self.blocks.tensors],
            MODEL.packing,
            axes="BHNC",
            num_blocks=num_slots,
            block_size=BLOCK,
            total_heads=MODEL.heads,
            rank=0,
            tp_size=1,
        )
