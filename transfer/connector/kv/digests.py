"""Digests of KV blocks: what the owner held when it offered them, to be compared on arrival.

A digest covers a *unit* of a few tokens of one KV head, over all layers, so that a rank that reads
only some heads, or cuts its blocks differently, can check what it got. It does not depend on where
in memory the bytes lie. The digests of all blocks are one table in host memory that readers read
along with the blocks; nothing else has to carry them.

The digest is a sum over the unit's 64-bit words ``x``, modulo 2**64::

    sum of  x * w  +  (x >> 32) * v        w, v: fixed odd numbers, other ones for every word

An odd factor loses no bit, so a change of one word always shows, and any other one escapes with a
chance of about one in 2**32. That is for accidents, not against an attacker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from transfer.connector.kv.layout import DIGEST_BYTES, KVLayout
from transfer.errors import ConfigurationError, Phase

UNIT_TOKENS = 16
"""Tokens of a unit, unless kernel blocks are smaller or no multiple of it."""

_WORD_BYTES = 8
_SEED = 20


def unit_tokens(kernel_tokens: int) -> int:
    """Tokens of a unit in kernel blocks of so many."""
    return math.gcd(kernel_tokens, UNIT_TOKENS)


class BlockDigests:
    """The digests of the KV blocks that one worker shows to others. All methods run on one thread.

    Args:
        tensors: one per layer, ``[kernel blocks, KV heads, tokens, content]``, in host memory.
        layout: says how a block's tokens are packed, and how many a unit has.

    Raises:
        ConfigurationError: the tensors are not aligned to 64 bits.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], layout: KVLayout) -> None:
        self._units = layout.digest_units
        views = [_words(tensor, layout) for tensor in tensors]
        self._layers = [(strips, _factors(strips, number)) for number, strips in enumerate(views)]
        self.table = torch.zeros(
            (tensors[0].shape[0] * layout.digest_units, tensors[0].shape[1]),
            dtype=torch.int64,
        )
        """Digests as the owner computed them: ``[kernel blocks * units, KV heads]``."""

    @property
    def memory(self) -> tuple[int, int]:
        """Address and length of the table in bytes."""
        return self.table.data_ptr(), self.table.numel() * DIGEST_BYTES

    def write(self, units: NDArray[np.int64]) -> None:
        """Computes the digests of some units, ``[n]``, and puts them into the table."""
        rows = torch.from_numpy(units)
        self.table.index_copy_(0, rows, self._computed(rows))

    def agree(self, units: NDArray[np.int64]) -> bool:
        """Whether the table has what the blocks have now, for some units, ``[n]``."""
        rows = torch.from_numpy(units)
        return torch.equal(self.table.index_select(0, rows), self._computed(rows))

    def _computed(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, KV heads]``."""
        # Kernel blocks as a whole, because their bytes lie together; then what was asked for.
        blocks, block_of_row = torch.unique(rows // self._units, return_inverse=True)
        total = torch.zeros((blocks.numel(), self.table.shape[1], self._units), dtype=torch.int64)
        for strips, factors in self._layers:
            for words, (low, high) in zip(strips, factors, strict=True):
                part = words.index_select(0, blocks)
                total += (part * low).sum(2).sum((3, 4))
                part >>= 32
                part *= high
                total += part.sum(2).sum((3, 4))
        return total[block_of_row, :, rows % self._units]


def _words(tensor: torch.Tensor, layout: KVLayout) -> list[torch.Tensor]:
    """Views ``[kernel blocks, KV heads, strips, units, runs, words]``, one for each width of strip.

    They show the tensor's memory as integers of 64 bits.
    """
    blocks, heads = tensor.shape[:2]
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    unit, units = layout.digest_tokens, layout.digest_units
    in_a_row = layout.token_stride == layout.token_bytes
    start = tensor.storage_offset() * tensor.element_size()
    views = []
    for count, width in layout.strips:
        runs, run_bytes = (1, unit * width) if in_a_row else (unit, width)
        per_token = width if in_a_row else layout.token_stride
        steps = (
            strides[0],
            strides[1],
            layout.kernel_tokens * width,
            unit * per_token,
            layout.token_stride,
        )
        if any(number % _WORD_BYTES for number in (start, run_bytes, *steps)):
            raise ConfigurationError(
                f"transfer.digests needs KV tensors that are aligned to {_WORD_BYTES} bytes; "
                f"{unit} tokens of this model's are not",
                phase=Phase.REGISTER,
            )
        shape = (blocks, heads, count, units, runs, run_bytes // _WORD_BYTES)
        in_words = (*(step // _WORD_BYTES for step in steps), 1)
        view = torch.empty(0, dtype=torch.int64)
        view.set_(tensor.untyped_storage(), start // _WORD_BYTES, shape, in_words)
        views.append(view)
        start += count * width * layout.kernel_tokens
    return views


def _factors(strips: Sequence[torch.Tensor], layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Odd numbers for the words of one unit and KV head: equal wherever this runs."""
    generator = np.random.Generator(np.random.PCG64([_SEED, layer]))
    factors = []
    for words in strips:
        count, units, runs, each = words.shape[2:]
        shape = (2, count, 1, runs, each)
        numbers = generator.integers(-(1 << 63), 1 << 63, size=shape, dtype=np.int64) | 1
        # Repeated for every unit, because broadcasting over short runs is slow.
        alike = torch.from_numpy(numbers).expand(2, count, units, runs, each)
        low, high = alike.contiguous().unbind(0)
        factors.append((low, high))
    return factors
