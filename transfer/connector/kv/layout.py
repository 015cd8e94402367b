"""What KV memory looks like, and where one block's bytes are in it. Pure arithmetic, no I/O.

vLLM 0.29 gives every layer a view of logical shape ``[B, H, N, C]``: blocks, KV heads, tokens in a
block, and content (key and value side by side). The physical order of the axes differs between
attention backends, so nothing here assumes one: the strides tell where each block's bytes lie.

    one layer, LBHNC (block interior contiguous)      LHBNC (a head's blocks together)

    base ─┬ block 0 ┬ head 0 ┬ tokens, content       base ─┬ head 0 ┬ block 0
          │         └ head 1 ┘  one chunk                   │        └ block 1   one chunk per
          └ block 1 ...                                     └ head 1 ...         head and block

The attention kernel may work on smaller blocks than the scheduler: ``B`` then counts these *kernel
blocks*, a whole number of which is a block. What is inside a head's part of a kernel block is
:mod:`transfer.connector.kv.packing`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from transfer.connector.kv.heads import HeadRange, heads_of
from transfer.connector.kv.packing import TOKENS, UNKNOWN_TOKENS, Packing
from transfer.errors import ConfigurationError, LayoutMismatch, Phase, ProtocolError

MAX_LAYOUT_BYTES = 1 << 20
MAX_ADDRESS = 1 << 62
MAX_COUNT = 1 << 40
MAX_STRIPS = 1 << 14
MAX_NAME_CHARS = 64
DIGEST_BYTES = 8


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
        bases: address of kernel block 0 of every layer, in layer order.
        axes: physical order of a layer's axes, outermost first: ``BHNC``, ``BNHC`` or ``HBNC``.
        kernel_stride: bytes from one kernel block to the next within a layer.
        head_stride: bytes from one KV head to the next within a kernel block.
        token_stride: bytes from one token to the next within a head.
        kernel_tokens: tokens of a kernel block.
        kernels_per_block: kernel blocks that are one of the scheduler's blocks.
        num_blocks: the scheduler's blocks; ids run from 0 to ``num_blocks - 1``.
        packing: name of the packing.
        strips: of the packing.
        granule: of the packing.
        total_heads: KV heads of the model; this worker has those that rank and tp_size say.
        digest_base: address of the worker's digests, 64 bits each, ``[kernel blocks, units, KV
            heads]``; 0 if it keeps none.
        digest_tokens: tokens of a unit; 0 if there are no digests.
    """

    bases: tuple[int, ...]
    axes: str
    kernel_stride: int
    head_stride: int
    token_stride: int
    kernel_tokens: int
    kernels_per_block: int
    num_blocks: int
    packing: str
    strips: tuple[tuple[int, int], ...]
    granule: int
    total_heads: int
    rank: int
    tp_size: int
    digest_base: int = 0
    digest_tokens: int = 0

    @property
    def block_size(self) -> int:
        """Tokens of one of the scheduler's blocks."""
        return self.kernel_tokens * self.kernels_per_block

    @property
    def heads(self) -> HeadRange:
        """The KV heads that this worker holds."""
        return heads_of(self.rank, self.tp_size, self.total_heads)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, of one layer and KV head."""
        return sum(count * width for count, width in self.strips)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and KV heads of this worker."""
        return self.token_bytes * self.block_size * len(self.heads) * len(self.bases)

    @property
    def digest_units(self) -> int:
        """Digests of one kernel block and KV head; 0 if there are none."""
        return self.kernel_tokens // self.digest_tokens if self.digest_tokens else 0

    @property
    def num_digests(self) -> int:
        """Digests of the whole pool."""
        kernel_blocks = self.num_blocks * self.kernels_per_block
        return kernel_blocks * self.digest_units * len(self.heads)

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
            layout = cls(**{item.name: _field(item.name, data[item.name]) for item in fields(cls)})
            possible = layout._is_possible()
        except (ValueError, KeyError, TypeError, RecursionError, LayoutMismatch) as error:
            raise ProtocolError(
                f"the peer's layout cannot be read: {error}", phase=Phase.CONNECT
            ) from error
        if not possible:
            raise ProtocolError("the peer's layout has numbers out of range", phase=Phase.CONNECT)
        return layout

    def _is_possible(self) -> bool:
        """Whether all of it fits an address space, so that no address can wrap around."""
        counts = (self.kernel_tokens, self.kernels_per_block, self.num_blocks, self.total_heads)
        if min(counts) < 1 or max(*counts, self.tp_size) > MAX_COUNT:
            return False
        if not 0 <= self.rank < self.tp_size or not self.bases or min(self.bases) < 0:
            return False
        if sorted(self.axes) != sorted("BHNC") or not self.axes.endswith("C"):
            return False
        strips = [number for strip in self.strips for number in strip]
        if not strips or min(strips) < 1 or sum(c for c, _ in self.strips) > MAX_STRIPS:
            return False
        strides = (self.kernel_stride, self.head_stride, self.token_stride)
        if min(strides) < 1 or not 1 <= self.granule <= self.kernel_tokens:
            return False
        if self.kernel_tokens % self.granule or not self._digests_are_possible():
            return False
        if len(self.strips) > 1 and self.token_stride != self.token_bytes:
            return False
        kernel_blocks = self.num_blocks * self.kernels_per_block
        end = (
            max(self.bases)
            + (kernel_blocks - 1) * self.kernel_stride
            + (len(self.heads) - 1) * self.head_stride
            + (self.kernel_tokens - 1) * self.token_stride
            + self.token_bytes
        )
        return end <= MAX_ADDRESS

    def _digests_are_possible(self) -> bool:
        if not self.digest_base and not self.digest_tokens:
            return True
        return (
            min(self.digest_base, self.digest_tokens) > 0
            and self.kernel_tokens % self.digest_tokens == 0
            and self.digest_base + self.num_digests * DIGEST_BYTES <= MAX_ADDRESS
        )


def describe(
    views: Sequence[LayerView],
    packing: Packing,
    *,
    axes: str,
    num_blocks: int,
    block_size: int,
    total_heads: int,
    rank: int,
    tp_size: int,
) -> KVLayout:
    """Makes the layout of a worker's KV tensors.

    Args:
        views: one per layer, all of equal shape and strides.
        packing: what is in ``[N, C]``.
        axes: physical order of ``B``, ``H``, ``N`` and ``C``, outermost first.
        num_blocks: blocks the scheduler counts; the tensors may hold a whole multiple of it when
            the attention kernel works on smaller blocks than the scheduler.
        total_heads: KV heads of the whole model.

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
    held = len(heads_of(rank, tp_size, total_heads))
    if heads != held:
        raise _unsupported(
            f"KV tensors with {heads} head slots for the {held} KV heads of a rank (the attention "
            "backend packs heads in a way of its own)"
        )
    content_bytes = content * first.itemsize
    if content_bytes != packing.token_bytes or (content > 1 and stride_c != first.itemsize):
        raise _unsupported(f"KV tensors whose tokens are not {packing.token_bytes} bytes in a row")
    token_stride = stride_n if tokens > 1 else content_bytes
    if packing.name != TOKENS and token_stride != content_bytes:
        raise _unsupported(f"KV tensors of order {axes} with packing {packing.name}")
    return KVLayout(
        bases=tuple(view.address for view in views),
        axes=axes,
        kernel_stride=stride_b,
        head_stride=stride_h if heads > 1 else max(1, stride_h),
        token_stride=token_stride,
        kernel_tokens=tokens,
        kernels_per_block=kernel_blocks,
        num_blocks=num_blocks,
        packing=packing.name,
        strips=packing.strips,
        granule=tokens if packing.granule == UNKNOWN_TOKENS else packing.granule,
        total_heads=total_heads,
        rank=rank,
        tp_size=tp_size,
    )


def _field(name: str, value: Any) -> Any:
    if name in ("axes", "packing"):
        if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
            raise TypeError(f"{value!r:.40} is not a name")
        return value
    if name == "bases":
        return tuple(_whole(item) for item in value)
    if name == "strips":
        return tuple((_whole(count), _whole(width)) for count, width in value)
    return _whole(value)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _unsupported(what: str) -> ConfigurationError:
    return ConfigurationError(f"BatonConnector does not support {what}", phase=Phase.REGISTER)
