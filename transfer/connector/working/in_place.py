"""The way of blocks that stay where they are: transports reach the KV cache itself, on its device.

Transports know nothing of the device's streams. So an owner offers a prompt when the model has
written it, and a reader asks for bytes when the model is through with what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch

from transfer.connector.memory.copy_thread import CopyThread
from transfer.connector.memory.device_event import Fence


class InPlace:
    """Waits for the model, on a thread of its own. No method blocks but :meth:`close`.

    Args:
        device: of the KV cache.
        name: of this worker.
        on_end: called when a wait has ended, mostly on that thread.
    """

    def __init__(self, device: torch.device, name: str, on_end: Callable[[], None]) -> None:
        self._device = device
        self._waits = CopyThread(f"baton-wait-{name}", device, on_end)

    def fence(self) -> Fence:
        """To be waited for before blocks are written to. On the model thread."""
        return Fence(self._device)

    def save(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        num_tokens: int,
        then: Callable[[], object],
    ) -> Future[None]:
        """As :meth:`Staging.save`, with nothing to copy: calls ``then`` after what the model has
        queued. On the model thread."""
        return self._waits.submit(_waiting(self.fence(), then))

    def close(self) -> None:
        """Ends the thread; waits that are not over end with an exception."""
        self._waits.close()


def _waiting(fence: Fence, then: Callable[[], object]) -> Iterator[None]:
    fence.synchronize()
    then()
    yield from ()
