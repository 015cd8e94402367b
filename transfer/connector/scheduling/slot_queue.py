"""Which request has which slots, and who is next to get some. Pure."""

from __future__ import annotations

from transfer.connector.memory.slots import SlotPool


class SlotQueue:
    """Slots for requests, first come first served, so that long prompts get their turn too.

    Args:
        pool: for these requests alone.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._held: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, None] = {}

    def has_room(self, request_id: str, count: int) -> bool:
        """Whether :meth:`take` would do. Whoever hears no waits until asking again, before those
        who come later, or until :meth:`give_back`.

        Args:
            count: at most as many as the pool has.
        """
        if request_id in self._held:
            return True
        first = next(iter(self._waiting), request_id)
        if first == request_id and count <= self._pool.num_free:
            return True
        self._waiting[request_id] = None
        return False

    def take(self, request_id: str, count: int) -> None:
        """Takes slots for a request, unless it has some.

        Raises:
            RuntimeError: there are too few.
        """
        if request_id in self._held:
            return
        slots = self._pool.take(count)
        if slots is None:
            raise RuntimeError(f"{count} slots for request {request_id}: nobody asked for room")
        self._waiting.pop(request_id, None)
        self._held[request_id] = tuple(slots)

    def held(self, request_id: str) -> tuple[int, ...]:
        """The request's slots; none if it has none."""
        return self._held.get(request_id, ())

    def give_back(self, request_id: str) -> None:
        """The request needs no slots, or none any more. Idempotent."""
        self._waiting.pop(request_id, None)
        self._pool.give_back(self._held.pop(request_id, ()))
