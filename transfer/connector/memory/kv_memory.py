"""The memory of one worker that transports see: its KV cache, or staging slots in host memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transfer.connector.kv.digests import BlockDigests, unit_tokens
from transfer.connector.kv.layout import KVLayout, describe
from transfer.connector.kv.packing import Packing
from transfer.connector.kv.tensors import axis_order, distinct, packing_of, storages, view_of
from transfer.connector.memory.host_blocks import HostBlocks
from transfer.connector.memory.kv_ranges import KVRange, ranges_in_place
from transfer.connector.memory.slots import count_slots
from transfer.connector.settings import ConnectorSettings

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class KVMemory:
    """Describes and, where transports do not reach the KV cache, allocates it.

    Args:
        vllm_config: the engine's configuration.
        settings: the connector's.
        kv_caches: layer name -> tensor ``[B, H, N, C]``; layers that share a tensor count once.
        num_blocks: of the KV cache, as the scheduler counts them.
        rank: tensor-parallel rank of this worker.

    Attributes:
        layout: of that memory.
        ranges: all of it, that of the digests included.
        device: of the KV cache.
        in_place: the memory is the KV cache, and what the model queues on its device has to be
            waited for.
        host_blocks: the slots; None if the memory is the KV cache.
        digests: None if the settings want none.

    Raises:
        ConfigurationError: memory that cannot be described, or that cannot hold a prompt.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: ConnectorSettings,
        kv_caches: dict[str, torch.Tensor],
        num_blocks: int,
        rank: int,
    ) -> None:
        self._vllm_config = vllm_config
        self._rank = rank
        tensors = distinct(kv_caches)
        packing = packing_of(vllm_config, tensors[0])
        layout = self._described(tensors, packing, num_blocks)
        self.device = tensors[0].device
        ranges = self._ranges(tensors, settings)
        self.in_place = ranges is not None and _has_streams(self.device, settings)
        self.host_blocks: HostBlocks | None = None
        if ranges is None:
            slots = self._count_slots(layout, settings.blocks.host_staging_bytes)
            self.host_blocks = HostBlocks(tensors, num_blocks, slots)
            tensors = list(self.host_blocks.tensors)
            ranges = [KVRange(*storage) for storage in storages(tensors)]
            layout = self._described(tensors, packing, slots)
            logger.info(
                "KV goes through %d blocks of host memory, %.2f GB",
                slots,
                slots * layout.block_bytes / 1e9,
            )
        self.ranges = ranges
        self.digests: BlockDigests | None = None
        if settings.blocks.digests:
            layout = replace(layout, digest_tokens=unit_tokens(layout.kernel_tokens))
            self.digests = BlockDigests(tensors, layout)
            layout = replace(layout, digest_base=self.digests.memory[0])
            self.ranges.append(KVRange(*self.digests.memory))
        self.layout = layout

    @property
    def num_slots(self) -> int:
        """0 if the memory is the KV cache."""
        return 0 if self.host_blocks is None else self.layout.num_blocks

    def _ranges(
        self, tensors: Sequence[torch.Tensor], settings: ConnectorSettings
    ) -> list[KVRange] | None:
        """Those of the KV cache, or None if it has to go through slots."""
        if settings.host_staging == "always":
            return None
        return ranges_in_place(storages(tensors), tensors[0].device.type, settings)

    def _described(
        self, tensors: Sequence[torch.Tensor], packing: Packing, num_blocks: int
    ) -> KVLayout:
        return describe(
            [view_of(tensor) for tensor in tensors],
            packing,
            axes=axis_order(tensors[0]),
            num_blocks=num_blocks,
            block_size=self._vllm_config.cache_config.block_size,
            total_heads=self._vllm_config.model_config.get_total_num_kv_heads(),
            rank=self._rank,
            tp_size=self._vllm_config.parallel_config.tensor_parallel_size,
        )

    def _count_slots(self, layout: KVLayout, host_bytes: int) -> int:
        transfer = self._vllm_config.kv_transfer_config
        return count_slots(
            host_bytes=host_bytes,
            block_bytes=layout.block_bytes,
            num_blocks=layout.num_blocks,
            prompt_blocks=-(-self._vllm_config.model_config.max_model_len // layout.block_size),
            roles=transfer.is_kv_producer + transfer.is_kv_consumer,
        )


def _has_streams(device: torch.device, settings: ConnectorSettings) -> bool:
    # What runs on the CPU is over when a call returns; ``never`` acts as if it were not.
    return device.type != "cpu" or settings.host_staging == "never"
