"""Which request has which slots in host memory, and who is next to get some. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from transfer.connector.memory.slots import SlotPool
from transfer.connector.scheduling.block_places import BlockPlaces


class SlotQueue(BlockPlaces):
    """Slots for requests, first come first served, so that long prompts get their turn too.

    Args:
        pool: for these requests alone.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._held: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, None] = {}

    def has_room(self, request_id: str, count: int) -> bool:
        if request_id in self._held:
            return True
        first = next(iter(self._waiting), request_id)
        if first == request_id and count <= self._pool.num_free:
            return True
        self._waiting[request_id] = None
        return False

    def take(self, request_id: str, count: int) -> None:
        if request_id in self._held:
            return
        slots = self._pool.take(count)
        if slots is None:
            raise RuntimeError(f"{count} slots for request {request_id}: nobody asked for room")
        self._waiting.pop(request_id, None)
        self._held[request_id] = tuple(slots)

    def places_of(self, request_id: str, block_ids: Sequence[int]) -> tuple[int, ...]:
        return self._held.get(request_id, ())[: len(block_ids)]

    def give_back(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._pool.give_back(self._held.pop(request_id, ()))
