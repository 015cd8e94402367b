"""What KV memory looks like, and where one block's bytes are in it. Pure arithmetic, no I/O.

vLLM 0.29 gives every layer a view of logical shape ``[B, H, N, C]``: blocks, KV heads, tokens in a
block, and content (key and value side by side). The physical order of the axes differs between
attention backends, so nothing here assumes one: the strides tell where each block's pieces lie.

    one layer, LBHNC (block interior contiguous)      LHBNC (a head's blocks together)

    base ─┬ block 0 ┬ head 0 ┬ tokens, content       base ─┬ head 0 ┬ block 0
          │         └ head 1 ┘  one chunk                   │        └ block 1   one chunk per
          └ block 1 ...                                     └ head 1 ...         head and block
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from transfer.errors import ConfigurationError, LayoutMismatch, Phase, ProtocolError
from transfer.types import ReadPlan, SpanArray

MAX_LAYOUT_BYTES = 1 << 20
MAX_ADDRESS = 1 << 62


@dataclass(frozen=True, slots=True)
class LayerView:
    """A layer's KV tensor as plain numbers: shape ``[B, H, N, C]``, strides in bytes."""

    address: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    itemsize: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one worker's KV memory is laid out.

    Attributes:
        bases: address of block 0 of every layer, in layer order.
        block_stride: bytes from one block to the next within a layer.
        chunk_offsets: where the contiguous pieces of one block start, in bytes from the block.
        chunk_bytes: length of each piece.
        num_blocks: blocks in the pool; ids run from 0 to ``num_blocks - 1``.
        block_size: tokens per block.
    """

    bases: tuple[int, ...]
    block_stride: int
    chunk_offsets: tuple[int, ...]
    chunk_bytes: int
    num_blocks: int
    block_size: int
    rank: int
    tp_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.chunk_bytes * len(self.chunk_offsets) * len(self.bases)

    def spans(self, block_ids: Sequence[int]) -> SpanArray:
        """All bytes of ``block_ids``: layer by layer, block by block, chunk by chunk.

        Returns:
            ``[layers * blocks * chunks, 2]``.

        Raises:
            LayoutMismatch: an id lies outside the pool.
        """
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.num_blocks):
            raise LayoutMismatch(
                f"a block id lies outside the pool of {self.num_blocks} blocks", phase=Phase.READ
            )
        layers = np.asarray(self.bases, dtype=np.uint64)[:, None, None]
        blocks = (ids.astype(np.uint64) * np.uint64(self.block_stride))[None, :, None]
        chunks = np.asarray(self.chunk_offsets, dtype=np.uint64)[None, None, :]
        addresses: NDArray[np.uint64] = (layers + blocks + chunks).reshape(-1)
        spans = np.empty((addresses.size, 2), dtype=np.uint64)
        spans[:, 0] = addresses
        spans[:, 1] = self.chunk_bytes
        return spans

    def encode(self) -> bytes:
        """For the handshake: JSON, at most :data:`MAX_LAYOUT_BYTES`."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Reads and checks what :meth:`encode` wrote at the peer.

        Raises:
            ProtocolError: anything that is not such a description.
        """
        if len(raw) > MAX_LAYOUT_BYTES:
            raise ProtocolError("the peer's layout is too long", phase=Phase.CONNECT)
        try:
            data = json.loads(raw)
            layout = cls(
                bases=tuple(_whole(item) for item in data["bases"]),
                chunk_offsets=tuple(_whole(item) for item in data["chunk_offsets"]),
                **{
                    name: _whole(data[name])
                    for name in (
                        "block_stride",
                        "chunk_bytes",
                        "num_blocks",
                        "block_size",
                        "rank",
                        "tp_size",
                    )
                },
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError(
                f"the peer's layout cannot be read: {error}", phase=Phase.CONNECT
            ) from error
        if not layout._is_possible():
            raise ProtocolError("the peer's layout has numbers out of range", phase=Phase.CONNECT)
        return layout

    def _is_possible(self) -> bool:
        """Whether all of it fits an address space, so that no address can wrap around."""
        counts = (self.block_stride, self.chunk_bytes, self.num_blocks, self.block_size)
        places = (*self.bases, *self.chunk_offsets)
        if not self.bases or not self.chunk_offsets or min(counts) < 1 or min(places) < 0:
            return False
        if not 0 <= self.rank < self.tp_size:
            return False
        last_block = (self.num_blocks - 1) * self.block_stride
        end = max(self.bases) + last_block + max(self.chunk_offsets) + self.chunk_bytes
        return end <= MAX_ADDRESS


def describe(
    views: Sequence[LayerView], *, num_blocks: int, block_size: int, rank: int, tp_size: int
) -> KVLayout:
    """Makes the layout of a worker's KV tensors.

    Args:
        views: one per layer, all of equal shape and strides.
        num_blocks: blocks the scheduler counts; the tensors may hold a whole multiple of it when
            the attention kernel works on smaller blocks than the scheduler.

    Raises:
        ConfigurationError: tensors that this connector cannot describe; says what was found.
    """
    if not views:
        raise _unsupported("the model has no KV cache tensors")
    first = views[0]
    for view in views:
        if (view.shape, view.strides, view.itemsize) != (
            first.shape,
            first.strides,
            first.itemsize,
        ):
            raise _unsupported("layers with KV tensors of different shapes")
    blocks, heads, tokens, content = first.shape
    stride_b, stride_h, stride_n, stride_c = first.strides
    kernel_blocks, rest = divmod(blocks, num_blocks)
    if rest or not kernel_blocks:
        raise _unsupported(f"KV tensors of {blocks} blocks for a pool of {num_blocks}")
    if kernel_blocks * tokens != block_size:
        raise _unsupported(
            f"{kernel_blocks} kernel blocks of {tokens} tokens for blocks of {block_size}"
        )
    offsets, length = _chunks(
        [(kernel_blocks, stride_b), (heads, stride_h), (tokens, stride_n), (content, stride_c)],
        first.itemsize,
    )
    return KVLayout(
        bases=tuple(view.address for view in views),
        block_stride=stride_b * kernel_blocks,
        chunk_offsets=offsets,
        chunk_bytes=length,
        num_blocks=num_blocks,
        block_size=block_size,
        rank=rank,
        tp_size=tp_size,
    )


def plan_read(
    local: KVLayout, local_ids: Sequence[int], remote: KVLayout, remote_ids: Sequence[int]
) -> ReadPlan:
    """Pairs the owner's blocks with ours, block for block.

    Raises:
        LayoutMismatch: the two sides cut a block differently; says how.
    """
    for name in ("block_size", "tp_size", "rank", "chunk_bytes"):
        ours, theirs = getattr(local, name), getattr(remote, name)
        if ours != theirs:
            raise LayoutMismatch(
                f"{name} is {theirs} at the owner and {ours} here; they must be equal",
                phase=Phase.READ,
            )
    if (len(local.bases), len(local.chunk_offsets)) != (
        len(remote.bases),
        len(remote.chunk_offsets),
    ):
        raise LayoutMismatch(
            "layers or chunks per block differ between owner and reader", phase=Phase.READ
        )
    if len(local_ids) != len(remote_ids):
        raise LayoutMismatch(
            f"{len(remote_ids)} blocks offered for {len(local_ids)} places", phase=Phase.READ
        )
    return ReadPlan(local=local.spans(local_ids), remote=remote.spans(remote_ids))


def _chunks(axes: list[tuple[int, int]], itemsize: int) -> tuple[tuple[int, ...], int]:
    """Offsets and length of the contiguous pieces that ``axes`` (count, stride) span.

    Offsets come in the logical order of the axes, so that two layouts with equal chunk lengths
    list the same piece at the same place.
    """
    length, inner = itemsize, set()
    for index in sorted(range(len(axes)), key=lambda i: axes[i][1]):
        count, stride = axes[index]
        if count == 1:
            inner.add(index)
        elif stride == length:
            length *= count
            inner.add(index)
        else:
            break
    offsets = np.zeros(1, dtype=np.int64)
    for index, (count, stride) in enumerate(axes):
        if index not in inner:
            steps = np.arange(count, dtype=np.int64) * stride
            offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
    return tuple(int(offset) for offset in offsets), length


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _unsupported(what: str) -> ConfigurationError:
    return ConfigurationError(f"BatonConnector does not support {what}", phase=Phase.REGISTER)
