"""Calls at points in time, from one thread that sleeps in between."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

_DROP_CANCELLED_ABOVE = 64


class TimerEntry:
    """One call that is due at some time."""

    __slots__ = ("at_s", "callback")

    def __init__(self, at_s: float, callback: Callable[[], None]) -> None:
        self.at_s = at_s
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: TimerEntry) -> bool:
        return self.at_s < other.at_s


class DeadlineTimer:
    """Runs callbacks at monotonic times. Thread-safe.

    Callbacks run one after the other on the timer's thread and must neither block nor raise.
    """

    def __init__(self, name: str) -> None:
        self._wake = threading.Condition()
        self._entries: list[TimerEntry] = []
        self._cancelled = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __repr__(self) -> str:
        return f"<DeadlineTimer {len(self._entries)} entries>"

    def start(self) -> None:
        self._thread.start()

    def schedule(self, at_s: float, callback: Callable[[], None]) -> TimerEntry:
        """Call ``callback`` at monotonic time ``at_s`` or soon after."""
        entry = TimerEntry(at_s, callback)
        with self._wake:
            heapq.heappush(self._entries, entry)
            if self._entries[0] is entry:
                self._wake.notify()
        return entry

    def cancel(self, entry: TimerEntry) -> None:
        """Do not call it, unless it runs already. Idempotent."""
        with self._wake:
            if entry.callback is None:
                return
            entry.callback = None
            self._cancelled += 1
            if self._cancelled > max(_DROP_CANCELLED_ABOVE, len(self._entries) // 2):
                self._entries = [kept for kept in self._entries if kept.callback is not None]
                heapq.heapify(self._entries)
                self._cancelled = 0

    def close(self) -> None:
        """Call nothing any more and join the thread. Idempotent; not from a callback."""
        with self._wake:
            self._closed = True
            self._entries.clear()
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while (callback := self._next_due()) is not None:
            callback()

    def _next_due(self) -> Callable[[], None] | None:
        """Sleep until something is due; None once closed."""
        with self._wake:
            while not self._closed:
                if not self._entries:
                    self._wake.wait()
                    continue
                left_s = self._entries[0].at_s - time.monotonic()
                if left_s > 0:
                    self._wake.wait(left_s)
                    continue
                entry = heapq.heappop(self._entries)
                if entry.callback is None:
                    self._cancelled = max(0, self._cancelled - 1)
                    continue
                callback, entry.callback = entry.callback, None
                return callback
            return None
