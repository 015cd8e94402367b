"""Where transports find a request's blocks: which places it has, and whether it gets some. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class BlockPlaces(ABC):
    """Places for the blocks of requests, as the workers' layout counts them. Not thread-safe."""

    @abstractmethod
    def has_room(self, request_id: str, count: int) -> bool:
        """Whether :meth:`take` would do. Whoever hears no waits until asking again, before those
        who come later, or until :meth:`give_back`.

        Args:
            count: at most as many as there are.
        """

    @abstractmethod
    def take(self, request_id: str, count: int) -> None:
        """Takes places for a request, unless it has some.

        Raises:
            RuntimeError: there are too few.
        """

    @abstractmethod
    def places_of(self, request_id: str, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Where transports find the first of a request's blocks, one for each of ``block_ids``;
        fewer if it took fewer places."""

    @abstractmethod
    def give_back(self, request_id: str) -> None:
        """The request needs no places, or none any more. Idempotent."""


class NoSlots(BlockPlaces):
    """Transports reach the KV cache itself: vLLM has given every block its place already."""

    def has_room(self, request_id: str, count: int) -> bool:
        return True

    def take(self, request_id: str, count: int) -> None:
        pass

    def places_of(self, request_id: str, block_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(block_ids)

    def give_back(self, request_id: str) -> None:
        pass
