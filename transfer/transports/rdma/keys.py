"""Which key opens which memory. Pure numpy; no Python loop per block."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from transfer.errors import Phase, ProtocolError
from transfer.types import ReadPlan, SpanArray

MAX_REGIONS = 65_536
MAX_RAILS = 16

_HEAD = struct.Struct("<IH")


@dataclass(frozen=True, slots=True, eq=False)
class KeyMap:
    """Keys of disjoint ranges of memory, in order of address.

    Attributes:
        starts: ``[n]`` addresses.
        ends: ``[n]`` addresses behind the last byte.
        bases: ``[n]`` what the devices call the first byte: the address itself but for memory that
            is known to them as a dma-buf.
        keys: ``[n, rails]``, one per device.
    """

    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    bases: NDArray[np.uint64]
    keys: NDArray[np.uint32]

    @classmethod
    def of(cls, regions: Iterable[tuple[int, int, int, tuple[int, ...]]], rails: int) -> Self:
        """From (address, length, base, key per rail); regions may overlap."""
        ranges: list[tuple[int, int, int, tuple[int, ...]]] = []
        reach = 0
        for address, length, base, keys in sorted(regions, key=lambda one: (one[0], -one[1])):
            # What an earlier region covers keeps its key: a read is cut where keys change.
            start, end = max(address, reach), address + length
            if start < end:
                ranges.append((start, end, base + start - address, keys))
                reach = end
        return cls(
            np.array([one[0] for one in ranges], dtype=np.uint64),
            np.array([one[1] for one in ranges], dtype=np.uint64),
            np.array([one[2] for one in ranges], dtype=np.uint64),
            np.array([one[3] for one in ranges], dtype=np.uint32).reshape(len(ranges), rails),
        )

    @property
    def rails(self) -> int:
        return int(self.keys.shape[1])

    def cover(self, spans: SpanArray) -> bool:
        """Whether every byte of ``spans`` has a key."""
        if not spans.shape[0]:
            return True
        if not self.starts.size:
            return False
        begins, ends = spans[:, 0], spans[:, 0] + spans[:, 1]
        first = np.searchsorted(self.starts, begins, side="right") - 1
        last = np.searchsorted(self.starts, ends, side="left") - 1
        if int(first.min()) < 0 or not bool((ends <= self.ends[last]).all()):
            return False
        # From the first range to the last there must be no gap.
        gaps = np.concatenate(([0], np.cumsum(self.starts[1:] != self.ends[:-1])))
        return bool((begins < self.ends[first]).all() and (gaps[first] == gaps[last]).all())

    def row_of(self, addresses: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Which range each address lies in, for addresses that are covered."""
        return np.searchsorted(self.starts, addresses, side="right") - 1

    def device_addresses(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What the devices call each address, for addresses that are covered."""
        row = self.row_of(addresses)
        return addresses - self.starts[row] + self.bases[row]

    def within(self, spans: SpanArray) -> KeyMap:
        """Only the ranges that ``spans`` touch."""
        first = np.searchsorted(self.ends, spans[:, 0], side="right")
        last = np.searchsorted(self.starts, spans[:, 0] + spans[:, 1], side="left")
        touched = np.zeros(self.starts.size + 1, dtype=np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last, -1)
        chosen = np.cumsum(touched[:-1]) > 0
        return KeyMap(self.starts[chosen], self.ends[chosen], self.bases[chosen], self.keys[chosen])

    @classmethod
    def joined(cls, maps: Sequence[Self]) -> Self:
        """All ranges of ``maps``, which agree where they overlap.

        Raises:
            ProtocolError: they are for different numbers of devices, or there is none.
        """
        rails = {one.rails for one in maps}
        if len(rails) != 1:
            raise _malformed(f"for {sorted(rails)} devices")
        starts, first = np.unique(np.concatenate([one.starts for one in maps]), return_index=True)
        return cls(
            starts,
            np.concatenate([one.ends for one in maps])[first],
            np.concatenate([one.bases for one in maps])[first],
            np.concatenate([one.keys for one in maps])[first],
        )

    def encode(self) -> bytes:
        return b"".join(
            (
                _HEAD.pack(self.starts.size, self.rails),
                self.starts.tobytes(),
                self.ends.tobytes(),
                self.bases.tobytes(),
                self.keys.tobytes(),
            )
        )

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Self:
        """Read what :meth:`encode` wrote at the peer.

        Raises:
            ProtocolError: it is not that.
        """
        if len(data) < _HEAD.size:
            raise _malformed(f"{len(data)} bytes")
        count, rails = _HEAD.unpack_from(data)
        if count > MAX_REGIONS or not 0 < rails <= MAX_RAILS:
            raise _malformed(f"{count} regions on {rails} devices")
        if len(data) != _HEAD.size + count * (24 + 4 * rails):
            raise _malformed(f"{count} regions in {len(data)} bytes")
        starts = np.frombuffer(data, "<u8", count, _HEAD.size)
        ends = np.frombuffer(data, "<u8", count, _HEAD.size + 8 * count)
        bases = np.frombuffer(data, "<u8", count, _HEAD.size + 16 * count)
        keys = np.frombuffer(data, "<u4", count * rails, _HEAD.size + 24 * count)
        if not bool((starts < ends).all() and (ends[:-1] <= starts[1:]).all()):
            raise _malformed("regions out of order")
        return cls(starts, ends, bases, keys.reshape(count, rails))


def cut_at_keys(plan: ReadPlan, local: KeyMap, remote: KeyMap) -> ReadPlan:
    """The same reads with rows cut where they pass from one range of a map into the next."""
    for side, keys in (("local", local), ("remote", remote)):
        spans: SpanArray = getattr(plan, side)
        begins, ends = spans[:, 0], spans[:, 0] + spans[:, 1]
        # Edges strictly inside a row:  starts[low:high]
        low = np.searchsorted(keys.starts, begins, side="right")
        high = np.searchsorted(keys.starts, ends, side="left")
        cuts = high - low
        if not cuts.any():
            continue
        row = np.repeat(np.arange(cuts.size), cuts + 1)
        nth = np.arange(row.size) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1)
        # Part n of a row runs from edge n-1 to edge n, its ends being the row's own.
        edge = np.concatenate((keys.starts, keys.starts[-1:]))[low[row] + nth]
        upto = np.where(nth == cuts[row], ends[row], edge)
        before = keys.starts[np.maximum(low[row] + nth - 1, 0)]
        since = np.where(nth == 0, begins[row], before)
        offset, length = since - begins[row], upto - since
        plan = ReadPlan(
            local=np.column_stack((plan.local[row, 0] + offset, length)),
            remote=np.column_stack((plan.remote[row, 0] + offset, length)),
        )
    return plan


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(f"keys of memory: {what}", phase=Phase.READ)
