"""When a replica is healthy. Pure; the servers ask the engine and pass answers and time in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TransferUnhealthy(RuntimeError):
    """The engine is there, but nothing can be handed over."""


class EngineHealth:
    """What an engine last told of itself.

    Kept apart from asking, because an engine answers between two steps only, and a long step is no
    illness: whoever checks gets the last answer at once.

    Args:
        timeout_s: how long an engine may go without an answer.
        now: seconds, on any clock that only goes forward.
    """

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._answered = now
        self._fault: str | None = None

    def take(self, statuses: Sequence[dict[str, Any]], now: float) -> None:
        """Takes the transfer status of all ranks."""
        self._answered = now
        self._fault = _fault(statuses)

    def require(self, now: float) -> None:
        """Checks the last answer.

        Raises:
            TransferUnhealthy: it told of a fault, or is too old; says which.
        """
        if self._fault is not None:
            raise TransferUnhealthy(self._fault)
        silent_s = now - self._answered
        if silent_s > self._timeout_s:
            raise TransferUnhealthy(
                f"the engine has not answered for {silent_s:.0f} s "
                f"({self._timeout_s:.0f} s are allowed)"
            )


def _fault(statuses: Sequence[dict[str, Any]]) -> str | None:
    if not statuses:
        return "no worker of the engine answered"
    for status in statuses:
        who = f"rank {status['rank']} of {status['engine_id']}"
        if not status["healthy"]:
            return f"the transfer engine of {who} is down"
        if not status["registered"]:
            return f"another start of {who} has taken its place in discovery"
    return None
