"""Whose cancellation a CancelledError is."""

from __future__ import annotations

import asyncio


def is_cancelled() -> bool:
    """Whether somebody cancels this task.

    Otherwise a CancelledError that it gets says only that something it waited for was cancelled.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
