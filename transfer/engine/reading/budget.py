"""A bound on the bytes that are on their way at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transfer.transports.interrupt import Interrupt


class ByteBudget:
    """First come, first served. Thread-safe.

    Args:
        limit_bytes: an amount above it is let through when nothing else is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._wake = threading.Condition()
        self._used_bytes = 0
        self._waiting: deque[object] = deque()

    def __repr__(self) -> str:
        return f"<ByteBudget {self._used_bytes} of {self._limit_bytes} used>"

    @contextmanager
    def taken(
        self,
        amount_bytes: int,
        interrupt: Interrupt,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Wait for ``amount_bytes`` and hold them within the block.

        Args:
            before_waiting: called if they are not there at once; what it raises goes through.

        Raises:
            TransferError: the interrupt's error, when it is set while waiting.
        """
        with interrupt.watched_by(self._notify):
            if not self._taken_at_once(amount_bytes):
                before_waiting()
                self._take(amount_bytes, interrupt)
        try:
            yield
        finally:
            with self._wake:
                self._used_bytes -= amount_bytes
                self._wake.notify_all()

    def _taken_at_once(self, amount_bytes: int) -> bool:
        with self._wake:
            free = not self._waiting and self._fits(amount_bytes)
            if free:
                self._used_bytes += amount_bytes
            return free

    def _take(self, amount_bytes: int, interrupt: Interrupt) -> None:
        place = object()
        with self._wake:
            self._waiting.append(place)
            try:
                while self._waiting[0] is not place or not self._fits(amount_bytes):
                    interrupt.check()
                    self._wake.wait()
                interrupt.check()
                self._used_bytes += amount_bytes
            finally:
                self._waiting.remove(place)
                self._wake.notify_all()

    def _fits(self, amount_bytes: int) -> bool:
        return not self._used_bytes or self._used_bytes + amount_bytes <= self._limit_bytes

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()
