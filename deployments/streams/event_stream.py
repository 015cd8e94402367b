"""An answer that comes bit by bit."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from deployments.errors import AnswerUnreadable
from deployments.streams.answer import Item


class EventStream:
    """Server-sent events, framed, some at a time. Iterated once, from one task.

    Whoever has one closes it, in whichever way it ends. Closing it, or cancelling the task that
    awaits its next events, ends the work for it everywhere.

    Args:
        first: the events that are there already.
        rest: what comes after them.
    """

    def __init__(self, first: str, rest: AsyncGenerator[Item, None]) -> None:
        self._first: str | None = first
        self._rest = rest

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> str:
        """The next events.

        Raises:
            AnswerUnreadable: something else came in mid-stream.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        item = await anext(self._rest)
        if not isinstance(item, str):
            raise AnswerUnreadable("a complete answer came in mid-stream")
        return item

    async def aclose(self) -> None:
        """Ends it; returns when that is done. Safe to repeat."""
        await self._rest.aclose()
