"""The pools that blocks are read from and into, shaped like the KV cache of a model."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.transfer.cases import Case

LAYERS = 30
PAGE = 4096
_WORD = 8
# Odd, so that different words have different contents.
_FACTOR = 0x9E3779B97F4A7C15
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Scatter:
    """Where the blocks of a case lie: byte offsets into the owner's and the reader's pool.

    Row i of one is read into row i of the other.
    """

    block_bytes: int
    remote: NDArray[np.int64]
    local: NDArray[np.int64]


def scatter(case: Case, pool_bytes: int) -> Scatter:
    """The same random blocks of every layer, different ones on the two sides. No chance involved:
    both processes get the same."""
    layer_bytes = pool_bytes // LAYERS // PAGE * PAGE
    slots = layer_bytes // case.block_bytes
    blocks = -(-case.count // LAYERS)
    random = np.random.default_rng([case.block_bytes, case.count])

    def side() -> NDArray[np.int64]:
        block_ids = random.choice(slots, blocks, replace=False)
        layers = np.arange(LAYERS, dtype=np.int64)[:, None] * layer_bytes
        offsets = layers + block_ids.astype(np.int64) * case.block_bytes
        return offsets.ravel()[: case.count].copy()

    return Scatter(case.block_bytes, side(), side())


def contiguous(case: Case) -> Scatter:
    """All blocks in order, for systems that know nothing else."""
    offsets = np.arange(case.count, dtype=np.int64) * case.block_bytes
    return Scatter(case.block_bytes, offsets, offsets)


class Pool:
    """Anonymous private memory in pages of 4 KiB, as torch allocates it.

    Every word of an owner's pool has contents of its own, so that a reader can tell whether each
    block came from the right place.
    """

    def __init__(self, size_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, size_bytes, flags=flags)
        self.size_bytes = size_bytes
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._words = self.bytes.view(np.uint64)
        self.address = int(self.bytes.ctypes.data)

    def fill(self, block_bytes: int, offsets: NDArray[np.int64]) -> None:
        """Write the contents that blocks of an owner have."""
        windows = self._windows(block_bytes)
        for some in _chunks(offsets, block_bytes):
            windows[some // PAGE] = _contents(block_bytes, some)

    def clear(self, block_bytes: int, offsets: NDArray[np.int64]) -> None:
        """Zero blocks; their pages are there afterwards."""
        windows = self._windows(block_bytes)
        for some in _chunks(offsets, block_bytes):
            windows[some // PAGE] = 0

    def blur(self, block_bytes: int, offsets: NDArray[np.int64]) -> None:
        """Spoil the first and the last word of every block, which is quick."""
        self._words[offsets // _WORD] = 0
        self._words[(offsets + block_bytes) // _WORD - 1] = 0

    def holds(self, where: Scatter, *, all_bytes: bool) -> bool:
        """Whether a read brought the right bytes: all of them, or the first and the last word of
        every block."""
        if not all_bytes:
            first, last = where.remote, where.remote + where.block_bytes - _WORD
            return bool(
                (self._words[where.local // _WORD] == _word(first)).all()
                and (
                    self._words[(where.local + where.block_bytes) // _WORD - 1] == _word(last)
                ).all()
            )
        windows = self._windows(where.block_bytes)
        chunks = zip(
            _chunks(where.local, where.block_bytes),
            _chunks(where.remote, where.block_bytes),
            strict=True,
        )
        return all(
            np.array_equal(windows[local // PAGE], _contents(where.block_bytes, remote))
            for local, remote in chunks
        )

    def drop(self) -> None:
        """Give all pages back."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _windows(self, block_bytes: int) -> NDArray[np.uint64]:
        """Row i: the block that begins at page i. Rows overlap."""
        rows = (self.size_bytes - block_bytes) // PAGE + 1
        shape = (rows, block_bytes // _WORD)
        return np.lib.stride_tricks.as_strided(self._words, shape, (PAGE, _WORD))


def _chunks(offsets: NDArray[np.int64], block_bytes: int) -> list[NDArray[np.int64]]:
    step = max(1, _CHUNK_BYTES // block_bytes)
    return [offsets[at : at + step] for at in range(0, offsets.size, step)]


def _word(offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Contents of the words at byte ``offsets``."""
    return offsets.astype(np.uint64) * np.uint64(_FACTOR) + np.uint64(1)


def _contents(block_bytes: int, offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    within = np.arange(0, block_bytes, _WORD, dtype=np.uint64) * np.uint64(_FACTOR)
    return _word(offsets)[:, None] + within
