"""Host copies of KV blocks that lie in device memory.

The transports read and write host memory. A GPU's blocks are copied to a mirror of the KV cache in
pinned host memory when they are offered, and from it when a read is confirmed. The code knows no
device by name: whatever torch can index and copy will do, host memory included, which is how it is
tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostMirror:
    """A mirror, block for block, of one worker's KV tensors.

    It takes as much host memory as the KV cache takes device memory. All methods run on the model
    thread, on the current stream, so that copies are ordered with the model's own work.

    Args:
        tensors: one per layer, ``[blocks, heads, tokens, content]``.
        num_blocks: blocks as the scheduler counts them; the tensors may hold a whole multiple.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int) -> None:
        self._device_side = tuple(tensors)
        self._rows_per_block = tensors[0].shape[0] // num_blocks
        self.tensors = tuple(_mirrored(tensor) for tensor in tensors)

    def save(self, block_ids: Sequence[int]) -> None:
        """Copies blocks to the mirror; they are there when this returns."""
        rows = self._rows(block_ids)
        copies = [
            tensor.index_select(0, rows.to(tensor.device)).to("cpu", non_blocking=True)
            for tensor in self._device_side
        ]
        self._wait()
        for mirror, copied in zip(self.tensors, copies, strict=True):
            mirror.index_copy_(0, rows, copied)

    def load(self, block_ids: Sequence[int]) -> None:
        """Copies blocks from the mirror; work queued after this on the stream sees them."""
        rows = self._rows(block_ids)
        for tensor, mirror in zip(self._device_side, self.tensors, strict=True):
            copied = mirror.index_select(0, rows).to(tensor.device)
            tensor.index_copy_(0, rows.to(tensor.device), copied)

    def _rows(self, block_ids: Sequence[int]) -> torch.Tensor:
        blocks = torch.tensor(block_ids, dtype=torch.int64) * self._rows_per_block
        return (blocks[:, None] + torch.arange(self._rows_per_block)[None, :]).reshape(-1)

    def _wait(self) -> None:
        device = self._device_side[0].device
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()


def _mirrored(tensor: torch.Tensor) -> torch.Tensor:
    """Zeroed host memory with the shape of ``tensor`` and its axes in the same physical order."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    physical = torch.zeros(
        [tensor.shape[axis] for axis in order],
        dtype=tensor.dtype,
        pin_memory=tensor.device.type != "cpu",
    )
    return physical.permute([order.index(axis) for axis in range(tensor.dim())])
