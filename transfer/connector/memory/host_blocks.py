"""Host memory that blocks of device memory are copied to and from.

The code knows no device by name: whatever torch can index and copy will do, host memory included,
which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostBlocks:
    """Slots in host memory, each of which has room for one block of one worker's KV tensors.

    Copies run on the calling thread and its current stream, and are over when a call returns.

    Args:
        tensors: one per layer, ``[blocks, heads, tokens, content]``.
        num_blocks: blocks as the scheduler counts them; the tensors may hold a whole multiple.
        num_slots: how many there are to be.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int, num_slots: int) -> None:
        self.device = tensors[0].device
        self._rows_per_block = tensors[0].shape[0] // num_blocks
        # Seen in the order in which the axes lie in memory, in which copies need no third place.
        order = _physical_order(tensors[0])
        back = [order.index(axis) for axis in range(4)]
        self._block_axis = order.index(0)
        self._device_side = [tensor.permute(order) for tensor in tensors]
        self._host_side = [
            _host_rows(tensor, self._block_axis, num_slots * self._rows_per_block)
            for tensor in self._device_side
        ]
        self.tensors = tuple(tensor.permute(back) for tensor in self._host_side)
        """One per layer, ``[slots, heads, tokens, content]`` or a whole multiple of slots, pinned
        if the device is not the CPU, with their axes in the same physical order."""

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copies blocks into slots."""
        rows = self._rows(block_ids).to(self.device)
        runs = _runs(self._rows(slots))
        axis = self._block_axis
        for layer, host in zip(self._device_side, self._host_side, strict=True):
            gathered = layer.index_select(axis, rows)
            for at, first, count in runs:
                host.narrow(axis, first, count).copy_(
                    gathered.narrow(axis, at, count), non_blocking=True
                )
        self._wait()

    def load(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        """Copies slots into blocks."""
        rows = self._rows(block_ids).to(self.device)
        runs = _runs(self._rows(slots))
        axis = self._block_axis
        for layer, host in zip(self._device_side, self._host_side, strict=True):
            shape = list(layer.shape)
            shape[axis] = rows.numel()
            gathered = torch.empty(shape, dtype=layer.dtype, device=self.device)
            for at, first, count in runs:
                gathered.narrow(axis, at, count).copy_(
                    host.narrow(axis, first, count), non_blocking=True
                )
            layer.index_copy_(axis, rows, gathered)
        self._wait()

    def _rows(self, numbers: Sequence[int]) -> torch.Tensor:
        blocks = torch.tensor(numbers, dtype=torch.int64) * self._rows_per_block
        return (blocks[:, None] + torch.arange(self._rows_per_block)[None, :]).reshape(-1)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()


def _physical_order(tensor: torch.Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))


def _host_rows(layer: torch.Tensor, axis: int, rows: int) -> torch.Tensor:
    """Zeroed host memory like ``layer``, but with ``rows`` in place of its blocks."""
    shape = list(layer.shape)
    shape[axis] = rows
    return torch.zeros(shape, dtype=layer.dtype, pin_memory=layer.device.type != "cpu")


def _runs(rows: torch.Tensor) -> list[tuple[int, int, int]]:
    """Rows that follow each other: where a run begins among ``rows``, its first row, how many."""
    numbers = rows.tolist()
    begins = [at for at in range(len(numbers)) if not at or numbers[at] != numbers[at - 1] + 1]
    ends = [*begins[1:], len(numbers)]
    return [(begin, numbers[begin], end - begin) for begin, end in zip(begins, ends, strict=True)]
