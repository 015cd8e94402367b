"""A connector whose reads can be made to arrive damaged: the fault that digests are for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.connector.napping_ranks import nap_instead_of_spinning
from transfer.connector.connector import BatonConnector
from transfer.connector.memory.kv_memory import KVMemory
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.connector.working.direct import Direct
from transfer.connector.working.start import start_worker

FOLDER = "BATON_TEST_CORRUPT"
"""Environment variable that names a folder. A file in it, named like a rank, damages the next
read that arrives there by one bit, and is deleted by that."""

nap_instead_of_spinning()


class DamagedOnArrival(Direct):
    """Damages what arrived before it is checked."""

    def finish_read(self, blocks: PromptBlocks, *, check: bool) -> None:
        layout = self._layout
        armed = Path(os.environ[FOLDER]) / str(layout.rank)
        if armed.exists():
            armed.unlink()
            kernel = blocks.block_ids[0] * layout.kernels_per_block
            address = layout.bases[-1] + kernel * layout.kernel_stride
            # Its first head, fourth token, sixth byte.
            ctypes.c_uint8.from_address(address + 3 * layout.token_stride + 5).value ^= 64
        super().finish_read(blocks, check=check)


def damaging_path(memory: KVMemory, name: str, on_end: Callable[[], None]) -> BlockPath:
    return DamagedOnArrival(memory.device, memory.layout, memory.digests)


class CorruptingConnector(BatonConnector):
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = start_worker(
            self._vllm_config, self._num_blocks, self._settings, kv_caches, damaging_path
        )
