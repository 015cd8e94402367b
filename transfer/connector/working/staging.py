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
from transfer.connector.memory.device_event import Fence
from transfer.connector.memory.host_blocks import HostBlocks
from transfer.errors import DigestMismatch, Phase

STEP_BLOCKS = 32
"""Blocks that are copied, or digested, before other prompts get a turn."""


class Staging:
    """Copies prompts between the KV cache and slots. No method blocks but :meth:`close`.

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
        self._blocks = blocks
        self._layout = layout
        self._digests = digests
        self._copies = CopyThread(f"baton-copy-{name}", blocks.device, on_end)

    def fence(self) -> Fence:
        """For :meth:`load`; on the model thread, when the blocks are known."""
        return Fence(self._blocks.device)

    def save(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        num_tokens: int,
        then: Callable[[], object],
    ) -> Future[None]:
        """Copies a prompt into slots, after what the model has queued. On the model thread.

        Args:
            num_tokens: from the beginning of the first block.
            then: called on the copy thread when they are there, digests included.
        """
        return self._copies.submit(self._saving(block_ids, slots, num_tokens, then, self.fence()))

    def load(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        tokens: range,
        fence: Fence,
        check: bool,
    ) -> Future[None]:
        """Copies slots into the KV cache, after the fence. Any thread.

        Args:
            tokens: of the prompt that the slots hold; the first is the first one of a block.
            check: whether the owner's digests came along. If they do not agree, nothing is copied
                and the exception is ``DigestMismatch``.
        """
        return self._copies.submit(self._loading(block_ids, slots, tokens, fence, check))

    def close(self) -> None:
        """Ends the thread; copies that are not over end with an exception."""
        self._copies.close()

    def _saving(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        num_tokens: int,
        then: Callable[[], object],
        fence: Fence,
    ) -> Iterator[None]:
        fence.wait()
        for part, stretch in self._parts(slots, range(num_tokens)):
            self._blocks.save(block_ids[part], stretch.block_ids)
            if self._digests is not None:
                self._digests.write(digest_units(self._layout, stretch))
            yield
        then()

    def _loading(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        tokens: range,
        fence: Fence,
        check: bool,
    ) -> Iterator[None]:
        fence.wait()
        if check and self._digests is not None:
            for _, stretch in self._parts(slots, tokens):
                if not self._digests.agree(digest_units(self._layout, stretch)):
                    raise DigestMismatch("its blocks arrived changed", phase=Phase.READ)
                yield
        for part, stretch in self._parts(slots, tokens):
            self._blocks.load(block_ids[part], stretch.block_ids)
            yield

    def _parts(self, slots: Sequence[int], tokens: range) -> Iterator[tuple[slice, Stretch]]:
        size = self._layout.block_size
        for begin in range(0, len(slots), STEP_BLOCKS):
            part = slice(begin, begin + STEP_BLOCKS)
            first = tokens.start + begin * size
            stop = min(tokens.stop, first + STEP_BLOCKS * size)
            yield part, Stretch(first, stop, slots[part], first // size)
