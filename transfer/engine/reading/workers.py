"""A few threads that start when there is work and end when there was none for a while."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

_LINGER_S = 60.0


class Workers:
    """Runs tasks in order of submission on at most ``limit`` threads. Thread-safe.

    Tasks must not raise.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._wake = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Workers {self._name} {len(self._tasks)} waiting, {len(self._threads)} threads>"

    @property
    def quiet(self) -> bool:
        """Whether nothing waits or runs."""
        with self._wake:
            return not self._tasks and self._idle == len(self._threads)

    @property
    def alive(self) -> bool:
        """Whether any thread is there."""
        return bool(self._threads)

    def submit(self, task: Callable[[], None]) -> bool:
        """Run ``task`` soon; False when closed.

        Raises:
            RuntimeError: no thread is there and none can be started; the task is not kept.
        """
        with self._wake:
            if self._closed:
                return False
            self._tasks.append(task)
            if len(self._tasks) <= self._idle:
                self._wake.notify()
            elif len(self._threads) < self._limit:
                try:
                    self._start_one()
                except RuntimeError:
                    if not self._threads:
                        self._tasks.pop()
                        raise
        return True

    def shut(self) -> None:
        """Take no more tasks. Does not block."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def join(self) -> None:
        """After :meth:`shut`: wait until the tasks are done and the threads have ended."""
        with self._wake:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        # It cannot end before: that takes the lock.
        self._threads.add(thread)

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                task()
        finally:
            with self._wake:
                self._threads.discard(threading.current_thread())

    def _next(self) -> Callable[[], None] | None:
        with self._wake:
            while not self._tasks:
                if self._closed:
                    return None
                self._idle += 1
                woken = self._wake.wait(_LINGER_S)
                self._idle -= 1
                if not woken and not self._tasks:
                    # Under the same lock as the decision, so that submit() does not count on it.
                    self._threads.discard(threading.current_thread())
                    return None
            return self._tasks.popleft()
