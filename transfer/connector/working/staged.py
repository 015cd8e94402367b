"""The way of blocks in device memory: through slots in host memory, copied on a thread of its own.

::

    owner     KV cache ──copy──> slots ──offered, read by transports──┐
    reader    KV cache <──copy── slots <───────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from transfer.connector.kv.digests import BlockDigests
from transfer.connector.kv.layout import KVLayout
from transfer.connector.kv.pairing import Stretch, digest_units
from transfer.connector.memory.copy_thread import CopyThread
from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.memory.host_blocks import HostBlocks
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.errors import DigestMismatch, Phase

STEP_BLOCKS = 32
"""Blocks that are copied, or digested, before other prompts get a turn."""


class Staged(BlockPath):
    """Copies prompts between the KV cache and slots. Readers' digests are compared in the slots,
    so that what was damaged never reaches the device.

    Args:
        blocks: the slots.
        layout: of the slots.
        digests: of the slots; None for none.
        name: of this worker.
        on_end: called when a copy has ended, mostly on the copy thread.
    """

    def __init__(
        self,
        blocks: HostBlocks,
        layout: KVLayout,
        digests: BlockDigests | None,
        name: str,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(blocks.device)
        self._blocks = blocks
        self._layout = layout
        self._digests = digests
        self._copies = CopyThread(f"baton-copy-{name}", blocks.device, on_end)

    def save(self, blocks: PromptBlocks, then: Callable[[], object]) -> Future[None]:
        return self._copies.submit(self._saving(blocks, then, self.mark()))

    def before_read(self, mark: DeviceEvent) -> None:
        pass

    def after_read(self, blocks: PromptBlocks, mark: DeviceEvent, *, check: bool) -> Future[None]:
        return self._copies.submit(self._loading(blocks, mark, check))

    def finish_read(self, blocks: PromptBlocks, *, check: bool) -> None:
        pass

    def close(self) -> None:
        self._copies.close()

    def _saving(
        self, blocks: PromptBlocks, then: Callable[[], object], mark: DeviceEvent
    ) -> Iterator[None]:
        mark.wait()
        for block_ids, stretch in self._steps(blocks):
            self._blocks.save(block_ids, stretch.block_ids)
            if self._digests is not None:
                self._digests.write(digest_units(self._layout, stretch))
            yield
        then()

    def _loading(self, blocks: PromptBlocks, mark: DeviceEvent, check: bool) -> Iterator[None]:
        mark.wait()
        if check and self._digests is not None:
            for _, stretch in self._steps(blocks):
                if not self._digests.agree(digest_units(self._layout, stretch)):
                    raise DigestMismatch("its blocks arrived changed", phase=Phase.READ)
                yield
        for block_ids, stretch in self._steps(blocks):
            self._blocks.load(block_ids, stretch.block_ids)
            yield

    def _steps(self, blocks: PromptBlocks) -> Iterator[tuple[Sequence[int], Stretch]]:
        """Blocks of the KV cache, and the stretch in slots that belongs to them."""
        size, tokens = self._layout.block_size, blocks.tokens
        for begin in range(0, len(blocks.places), STEP_BLOCKS):
            step = slice(begin, begin + STEP_BLOCKS)
            first = tokens.start + begin * size
            part = range(first, min(tokens.stop, first + STEP_BLOCKS * size))
            some = PromptBlocks(blocks.block_ids[step], blocks.places[step], part)
            yield some.block_ids, some.stretch(size)
