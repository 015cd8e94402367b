"""The way of a prompt's blocks between the KV cache and the memory that transports reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from transfer.connector.kv.pairing import Stretch
from transfer.connector.memory.device_event import DeviceEvent


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """Tokens of one prompt, and the blocks that hold them at one worker.

    Attributes:
        block_ids: of the KV cache.
        places: where transports find them, one for each block: a slot, or that block itself.
        tokens: of the prompt; the first is the first one of a block.
    """

    block_ids: Sequence[int]
    places: Sequence[int]
    tokens: range

    def stretch(self, block_size: int) -> Stretch:
        """The tokens at their places, in blocks of so many tokens."""
        first = self.tokens.start
        return Stretch(first, self.tokens.stop, self.places, first // block_size)


class BlockPath(ABC):
    """One worker's way. An owner calls :meth:`save`; a reader, for each read, :meth:`mark`,
    :meth:`before_read`, :meth:`after_read` and :meth:`finish_read`, in this order.

    Args:
        device: of the KV cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @abstractmethod
    def save(self, blocks: PromptBlocks, then: Callable[[], object]) -> Future[None]:
        """Lets what the model has computed, or queued on its device, be read, digests included.

        On the model thread; does not wait for the device.

        Args:
            then: called when readers may begin.

        Returns:
            done when nothing uses the blocks any more but readers; with an exception if they do
            not get ready.
        """

    def mark(self) -> DeviceEvent:
        """What the model has queued so far, on blocks that are to be written to among others.

        On the model thread, when it is known which blocks those are.
        """
        return DeviceEvent(self._device)

    @abstractmethod
    def before_read(self, mark: DeviceEvent) -> None:
        """Before bytes are asked for. On a thread that may wait for the device."""

    @abstractmethod
    def after_read(self, blocks: PromptBlocks, mark: DeviceEvent, *, check: bool) -> Future[None]:
        """All bytes have arrived at their places. Any thread; does not block.

        Args:
            check: the owner's digests came along.

        Returns:
            done when what arrived is in the KV cache; with an exception if it did not get there,
            ``DigestMismatch`` because it is not what the owner had.
        """

    @abstractmethod
    def finish_read(self, blocks: PromptBlocks, *, check: bool) -> None:
        """The last step, on the model thread, before a request uses the blocks.

        Raises:
            DigestMismatch: what arrived is not what the owner had.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends what is under way, with exceptions in its futures. May block; safe to call twice."""
