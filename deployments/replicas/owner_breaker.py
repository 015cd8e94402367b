"""Which owners a decode replica reads from at present: a circuit breaker for each. Pure.

A read over a bad link ends at its deadline, and every request with a ticket of that owner would
wait for it. After a few failures in a row the owner's tickets are left unread, and their prompts
computed here, until a pause is over; then one request tries again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to stop reading from an owner.

    Attributes:
        failures: in a row.
        pause_s: how long to stop, and between trials after it.
    """

    failures: int = 3
    pause_s: float = 30.0


@dataclass(slots=True)
class _Link:
    ok: int = 0
    failed: int = 0
    in_a_row: int = 0
    stopped: float | None = None


class OwnerBreakers:
    """The breakers of one reader, one for each link from an owner. Not thread-safe.

    Args:
        policy: when to stop.
    """

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._links: dict[tuple[str, int], _Link] = {}

    def take(self, statuses: Iterable[Mapping[str, Any]], now: float) -> list[str]:
        """Takes the reader's status of all ranks, which counts reads since its start.

        Returns:
            Owners from which reading has stopped with this.
        """
        stopped = []
        for status in statuses:
            rank, ok, failed = status["rank"], status["reads_by_owner"], status["failed_by_owner"]
            for owner in {**ok, **failed}:
                link = self._links.setdefault((owner, rank), _Link())
                if self._count(link, ok.get(owner, 0), failed.get(owner, 0), now):
                    stopped.append(owner)
        return stopped

    def may_read(self, owner: str, now: float) -> bool:
        """Whether to read from this owner. A True after a pause is the one trial."""
        stopped = [
            link
            for (name, _), link in self._links.items()
            if name == owner and link.stopped is not None
        ]
        if any(now - (link.stopped or 0.0) < self._policy.pause_s for link in stopped):
            return False
        for link in stopped:
            link.stopped = now
        return True

    def _count(self, link: _Link, ok: int, failed: int, now: float) -> bool:
        """Takes totals; whether reading stops with them."""
        newly_ok, newly_failed = ok - link.ok, failed - link.failed
        link.ok, link.failed = ok, failed
        if newly_ok:
            # In which order they came is not known; a link that works at all is worth reading.
            link.in_a_row, link.stopped = 0, None
            return False
        link.in_a_row += newly_failed
        if not newly_failed or link.in_a_row < self._policy.failures:
            return False
        before, link.stopped = link.stopped, now
        return before is None
