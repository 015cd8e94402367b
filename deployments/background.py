"""Tasks that outlive the request that started them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Callable, Coroutine
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

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts ``work`` in the running loop; if it fails, that is logged under ``name``."""
        return self._start(work, functools.partial(_log_failure, name))

    def call(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The same for work whose starter awaits it: how it fails is told to the starter alone."""
        return self._start(work, _take_failure)

    def _start(
        self, work: Coroutine[Any, Any, T], done: Callable[[asyncio.Task[Any]], None]
    ) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)
        return task

    async def drain(self) -> None:
        """Waits until all are done."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _log_failure(name: str, task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("%s failed: %s", name, error)


def _take_failure(task: asyncio.Task[Any]) -> None:
    """Takes note of an error, which asyncio would tell of otherwise if the starter is gone."""
    if not task.cancelled():
        task.exception()
