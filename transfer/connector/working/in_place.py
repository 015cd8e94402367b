"""The way of blocks that transports reach where the model computes them, on its device.

Transports know nothing of the device's streams. So an owner offers a prompt when the model has
written it, and a reader asks for bytes when the model is through with what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import torch

from transfer.connector.kv.digests import BlockDigests
from transfer.connector.kv.layout import KVLayout
from transfer.connector.memory.copy_thread import CopyThread
from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.working.block_path import PromptBlocks
from transfer.connector.working.direct import Direct


class InPlace(Direct):
    """As :class:`Direct`, but waits for the model; an owner does so on a thread of its own.

    Args:
        device: of the KV cache.
        layout: of the KV cache.
        digests: of the KV cache, which is in host memory then; None for none.
        name: of this worker.
        on_end: called when a wait has ended, mostly on that thread.
    """

    def __init__(
        self,
        device: torch.device,
        layout: KVLayout,
        digests: BlockDigests | None,
        name: str,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(device, layout, digests)
        self._waits = CopyThread(f"baton-wait-{name}", device, on_end)

    def save(self, blocks: PromptBlocks, then: Callable[[], object]) -> Future[None]:
        self._write_digests(blocks)
        return self._waits.submit(_waiting(self.mark(), then))

    def before_read(self, mark: DeviceEvent) -> None:
        mark.synchronize()

    def close(self) -> None:
        self._waits.close()


def _waiting(mark: DeviceEvent, then: Callable[[], object]) -> Iterator[None]:
    mark.synchronize()
    then()
    yield from ()
