"""KV memory as vLLM lays it out, written and read token by token: what layouts are checked against.

Nothing here uses Baton's arithmetic on layouts. Every place is found by plain tensor indexing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from transfer.connector.kv.layout import KVLayout, LayerView, describe
from transfer.connector.kv.packing import Packing, cpu_packing, token_major

CPU_LAYOUTS = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LHBNC)
"""Those in which a head's tokens lie together, as the CPU's packings need it."""


@dataclass(frozen=True)
class Model:
    """What both sides of a hand-off have in common.

    Attributes:
        kind: ``tokens``, ``cpu-vec`` or ``cpu-amx``.
        head_size: elements of a key, and of a value.
    """

    kind: str
    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def packing(self) -> Packing:
        itemsize = self.dtype.itemsize
        if self.kind == "tokens":
            return token_major(2 * self.head_size * itemsize)
        return cpu_packing(self.kind.removeprefix("cpu-"), self.head_size, itemsize)

    def values(self, tokens: int) -> torch.Tensor:
        """A number of its own for every ``[layer, token, head, element]``, as far as they go."""
        shape = (self.layers, tokens, self.heads, 2 * self.head_size)
        return torch.arange(math.prod(shape)).to(self.dtype).view(shape)


@dataclass(frozen=True)
class Pool:
    """One rank's KV memory."""

    model: Model
    layers: tuple[torch.Tensor, ...]
    layout: KVLayout

    def write(self, block_ids: Sequence[int], values: torch.Tensor) -> None:
        """Puts ``values`` of this rank's heads into blocks, from token 0 on."""
        self._each(block_ids, values, write=True)

    def read(self, block_ids: Sequence[int], tokens: int) -> torch.Tensor:
        """``[layers, tokens, heads of this rank, content]``."""
        heads = len(self.layout.heads)
        shape = (len(self.layers), tokens, heads, 2 * self.model.head_size)
        values = torch.empty(shape, dtype=self.model.dtype)
        self._each(block_ids, values, write=False)
        return values

    def copy(self) -> list[torch.Tensor]:
        """All of its content, by block, whatever it means."""
        return [layer.clone() for layer in self.layers]

    def _each(self, block_ids: Sequence[int], values: torch.Tensor, *, write: bool) -> None:
        kernels, size = self.layout.kernels_per_block, self.layout.kernel_tokens
        kernel_ids = [block * kernels + nth for block in block_ids for nth in range(kernels)]
        for begin, kernel in zip(
            range(0, values.shape[1], size), kernel_ids[: -(-values.shape[1] // size)], strict=True
        ):
            for layer, tensor in enumerate(self.layers):
                for head in range(len(self.layout.heads)):
                    shown = values[layer, begin : begin + size, head]
                    cell = tensor[kernel, head]
                    whole = _unpacked(self.model, cell)
                    if write:
                        whole[: len(shown)] = shown
                        cell.copy_(_packed(self.model, whole))
                    else:
                        shown.copy_(whole[: len(shown)])


def make_pool(
    model: Model,
    physical: KVCacheLayout,
    *,
    num_blocks: int,
    kernel_tokens: int,
    kernels_per_block: int = 1,
    rank: int = 0,
    tp_size: int = 1,
    seed: int = 0,
) -> Pool:
    """As vLLM does it: one allocation in physical order, seen through a logical permutation."""
    heads = max(1, model.heads // tp_size)
    logical = (
        model.layers,
        num_blocks * kernels_per_block,
        heads,
        kernel_tokens,
        2 * model.head_size,
    )
    order = physical.stride_order
    raw = torch.randint(
        0,
        256,
        (math.prod(logical) * model.dtype.itemsize,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    base = raw.view(model.dtype).view([logical[axis] for axis in order])
    layers = tuple(base.permute([order.index(axis) for axis in range(5)]).unbind(0))
    layout = describe(
        [view_of(layer) for layer in layers],
        model.packing,
        axes="".join("BHNC"[axis] for axis in physical.layer_view_order),
        num_blocks=num_blocks,
        block_size=kernel_tokens * kernels_per_block,
        total_heads=model.heads,
        rank=rank,
        tp_size=tp_size,
    )
    return Pool(model, layers, layout)


def view_of(tensor: torch.Tensor) -> LayerView:
    blocks, heads, tokens, content = tensor.shape
    b, h, n, c = (stride * tensor.element_size() for stride in tensor.stride())
    return LayerView(
        tensor.data_ptr(), (blocks, heads, tokens, content), (b, h, n, c), tensor.element_size()
    )


def _unpacked(model: Model, cell: torch.Tensor) -> torch.Tensor:
    """``[tokens, content]`` of a head's part of a kernel block, key before value."""
    tokens, size = cell.shape[0], model.head_size
    if model.kind == "tokens":
        return cell.clone()
    keys, values = cell.reshape(2, tokens * size)
    if model.kind == "cpu-vec":
        return torch.cat([keys.view(size, tokens).T, values.view(tokens, size)], 1)
    keys = keys.view(tokens // 16, size // 2, 16, 2).permute(0, 2, 1, 3).reshape(tokens, size)
    values = values.view(size // 16, tokens // 2, 16, 2).permute(1, 3, 0, 2).reshape(tokens, size)
    return torch.cat([keys, values], 1)


def _packed(model: Model, content: torch.Tensor) -> torch.Tensor:
    tokens, size = content.shape[0], model.head_size
    if model.kind == "tokens":
        return content
    keys, values = content[:, :size], content[:, size:]
    if model.kind == "cpu-vec":
        parts = [keys.T.reshape(-1), values.reshape(-1)]
    else:
        tiles = keys.reshape(tokens // 16, 16, size // 2, 2).permute(0, 2, 1, 3)
        pairs = values.reshape(tokens // 2, 2, size // 16, 16).permute(2, 0, 3, 1)
        parts = [tiles.reshape(-1), pairs.reshape(-1)]
    return torch.cat(parts).view(tokens, 2 * size)
