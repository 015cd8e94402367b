"""Work that many ask for at once and that is done once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Shared(Generic[Result]):
    """Runs ``work`` one at a time; all who ask meanwhile, and a little later, get what it returns.

    All calls come from one event loop. What it raises goes to those who waited for it, and is not
    kept.

    Args:
        work: what is done.
        keep_s: how long after its end a result is given out.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[Result]],
        keep_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._keep_s = keep_s
        self._clock = clock
        self._running: asyncio.Task[Result] | None = None
        self._kept: tuple[float, Result] | None = None

    async def get(self) -> Result:
        """The result; a caller that is cancelled leaves the work to the others."""
        if self._kept is not None and self._clock() - self._kept[0] < self._keep_s:
            return self._kept[1]
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())
        return await asyncio.shield(self._running)

    async def _run(self) -> Result:
        try:
            result = await self._work()
        finally:
            self._running = None
        self._kept = (self._clock(), result)
        return result
