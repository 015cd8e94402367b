"""When a replica is healthy. Pure; the servers ask the engine and pass the answer in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TransferUnhealthy(RuntimeError):
    """The engine answers, but its transfer engine cannot hand anything over."""


def require_healthy(statuses: Sequence[dict[str, Any]]) -> None:
    """Checks the transfer status of all ranks.

    Raises:
        TransferUnhealthy: no rank answered, or one's transfer engine is down; names it.
    """
    if not statuses:
        raise TransferUnhealthy("no worker of the engine answered")
    for status in statuses:
        if not status["healthy"]:
            raise TransferUnhealthy(
                f"the transfer engine of rank {status['rank']} of {status['engine_id']} is down"
            )
