"""What one read asks of the devices. Pure numbers; no Python loop per block but on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from transfer.spans import concat, total_bytes
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.verbs.queue_pair import Read
from transfer.types import ReadPlan, SpanArray

BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Reads that are asked for together: rows ``start`` to ``stop`` of the work."""

    start: int
    stop: int
    size_bytes: int


class Work:
    """What one read asks for, as plain numbers: taken out of the arrays once, not per batch.

    Args:
        slices: each becomes a batch; cut where keys change.
        local: keys for all that is written.
        remote: keys for all that is read.
    """

    def __init__(self, slices: Iterable[ReadPlan], local: KeyMap, remote: KeyMap) -> None:
        slices = list(slices)
        rows = np.cumsum([0, *(slice_.local.shape[0] for slice_ in slices)]).tolist()
        self.batches = [
            Batch(start, stop, total_bytes(slice_.local))
            for start, stop, slice_ in zip(rows, rows[1:], slices, strict=False)
        ]
        own = concat([slice_.local for slice_ in slices])
        far = concat([slice_.remote for slice_ in slices])
        self.addresses: list[int] = _device_addresses(local, own)
        self.lengths: list[int] = own[:, 1].tolist()
        self.far_addresses: list[int] = _device_addresses(remote, far)
        self._local_keys = _keys_per_rail(local, own)
        self._far_keys = _keys_per_rail(remote, far)

    def reads(self, batch: Batch, own_rail: int, far_rail: int) -> Iterator[Read]:
        """The rows of a batch with the keys for these devices."""
        rows = slice(batch.start, batch.stop)
        return zip(
            self.addresses[rows],
            self.lengths[rows],
            self._local_keys[own_rail][rows],
            self.far_addresses[rows],
            self._far_keys[far_rail][rows],
            strict=True,
        )


def _device_addresses(keys: KeyMap, spans: SpanArray) -> list[int]:
    return keys.device_addresses(spans[:, 0]).tolist() if spans.shape[0] else []


def _keys_per_rail(keys: KeyMap, spans: SpanArray) -> list[list[int]]:
    if not spans.shape[0]:
        return [[] for _ in range(keys.rails)]
    of_rows = keys.keys[keys.row_of(spans[:, 0])]
    return [of_rows[:, rail].tolist() for rail in range(keys.rails)]
