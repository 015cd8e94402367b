"""What stops a read that other threads carry on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transfer.errors import TransferError


class Interrupt:
    """Stops one read from outside. Thread-safe; the first error wins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: TransferError | None = None
        self._callbacks: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Interrupt {'set' if self._error else 'clear'}>"

    @property
    def error(self) -> TransferError | None:
        return self._error

    def set(self, error: TransferError) -> None:
        """Stop the read with ``error``: calls every watcher, none of which may block."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            for callback in self._callbacks:
                callback()

    def check(self) -> None:
        """Raise the error if there is one."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def watched_by(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` if the interrupt is set within the block.

        Raises:
            TransferError: the interrupt's error, when it is set already.
        """
        with self._lock:
            self.check()
            self._callbacks.append(callback)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)
