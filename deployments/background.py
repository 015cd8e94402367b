"""Tasks that outlive the request that started them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

T = TypeVar("T")


class Background:
    """Keeps tasks alive until they are done.

    Each runs in a fresh context: Serve ties calls to the request in whose context they are made,
    and cancels them with it; these must go through just when the request is cancelled.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts ``work`` in the running loop."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a notice did not get through: %s", error)

    async def drain(self) -> None:
        """Waits until all are done."""
        while self._tasks:
            await asyncio.wait(self._tasks)
