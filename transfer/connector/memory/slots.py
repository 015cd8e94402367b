"""Staging slots: places in host memory that blocks of device memory go through. Pure.

Each has room for one block. They have nothing to do with vLLM's ``slot_mapping``, whose slots are
of one token each.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from transfer.errors import ConfigurationError, Phase

PROMPTS = 4
"""Longest prompts that there is room for, unless a setting says otherwise."""


class SlotPool:
    """Free and taken slots, each of which has room for one block. Not thread-safe.

    Args:
        slots: numbers of all.
    """

    def __init__(self, slots: Iterable[int]) -> None:
        self._free = sorted(slots)
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """``count`` slots, the lowest, so that they lie together; None if there are fewer."""
        if count > len(self._free):
            return None
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Lets others take them.

        Raises:
            ValueError: one is not taken, or named twice; then nothing is given back.
        """
        given = set(slots)
        if len(given) != len(slots) or not given <= self._taken:
            raise ValueError(f"slots that are not taken, or named twice: {slots}")
        self._taken -= given
        for slot in slots:
            heapq.heappush(self._free, slot)


def count_slots(
    *, host_bytes: int, block_bytes: int, num_blocks: int, prompt_blocks: int, roles: int
) -> int:
    """Slots that a worker has.

    Args:
        host_bytes: that may be used; 0 for :data:`PROMPTS` prompts.
        block_bytes: of one block, over all layers.
        num_blocks: of the KV cache; more slots make no sense.
        prompt_blocks: of the longest prompt.
        roles: 2 if the engine both prefills for others and decodes, otherwise 1. Each gets an equal
            part of the slots, and must have room for one prompt.

    Raises:
        ConfigurationError: there is no room for a prompt; says what would do.
    """
    least = roles * prompt_blocks
    if host_bytes == 0:
        return max(least, min(PROMPTS * prompt_blocks, num_blocks))
    slots = host_bytes // block_bytes
    if slots < least:
        raise ConfigurationError(
            f"transfer.host_staging_bytes is {host_bytes}, too few for "
            f"{'a prompt' if roles == 1 else 'two prompts'} of max_model_len; "
            f"{least * block_bytes} would do, or 0 for the default",
            phase=Phase.REGISTER,
        )
    return min(slots, max(least, num_blocks))
