"""The way of blocks that transports reach where the model computes them, in host memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from transfer.connector.kv.digests import BlockDigests
from transfer.connector.kv.layout import KVLayout
from transfer.connector.kv.pairing import digest_units
from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.errors import DigestMismatch, Phase


class Direct(BlockPath):
    """Nothing has to be moved, and what the model computes is there when a step is over.

    Digests are made and compared on the model thread.

    Args:
        device: of the KV cache.
        layout: of the KV cache.
        digests: of the KV cache; None for none.
    """

    def __init__(
        self, device: torch.device, layout: KVLayout, digests: BlockDigests | None
    ) -> None:
        super().__init__(device)
        self._layout = layout
        self._digests = digests

    def save(self, blocks: PromptBlocks, then: Callable[[], object]) -> Future[None]:
        self._write_digests(blocks)
        then()
        return _done()

    def before_read(self, mark: DeviceEvent) -> None:
        pass

    def after_read(self, blocks: PromptBlocks, mark: DeviceEvent, *, check: bool) -> Future[None]:
        return _done()

    def finish_read(self, blocks: PromptBlocks, *, check: bool) -> None:
        if check and self._digests is not None:
            units = digest_units(self._layout, blocks.stretch(self._layout.block_size))
            if not self._digests.agree(units):
                raise DigestMismatch("its blocks arrived changed", phase=Phase.READ)

    def close(self) -> None:
        pass

    def _write_digests(self, blocks: PromptBlocks) -> None:
        if self._digests is not None:
            units = digest_units(self._layout, blocks.stretch(self._layout.block_size))
            self._digests.write(units)


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
