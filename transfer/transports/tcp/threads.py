"""Threads for connections: one each, which serves another one when its own has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from transfer.transports.tcp.streams.stream import TcpStream

_LINGER_S = 10.0
_MOST_IDLE = 32
_IDLE_NAME = "baton-idle"


class ServingThreads:
    """Serves every stream on a thread of its own. Thread-safe.

    To start them is a tenth of a small read over new connections. So a few that have no stream wait
    for the next, and end if none comes for a while.

    Args:
        name: begins that of a thread that serves, and the peer's ends it.
        serve: returns when the stream has ended; must not raise.
        linger_s: how long a thread waits.
        most_idle: how many wait.
    """

    def __init__(
        self,
        name: str,
        serve: Callable[[TcpStream], None],
        linger_s: float = _LINGER_S,
        most_idle: int = _MOST_IDLE,
    ) -> None:
        self._name = name
        self._serve = serve
        self._linger_s = linger_s
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        # As many threads wait for something in the queue as it has entries, and these besides.
        self._idle = 0
        self._waiting: SimpleQueue[TcpStream | None] = SimpleQueue()
        self._closed = False

    def __repr__(self) -> str:
        return f"<ServingThreads {self._name} {len(self._threads)}, {self._idle} of them idle>"

    def serve(self, stream: TcpStream) -> None:
        """Begin to serve ``stream``. Not after :meth:`close`.

        Raises:
            RuntimeError: no thread is idle and none can be started.
        """
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._waiting.put(stream)
            else:
                thread = threading.Thread(
                    target=self._run, args=(stream,), name=self._serving(stream), daemon=True
                )
                thread.start()
                # It cannot end before: that takes the lock.
                self._threads.add(thread)

    def close(self) -> None:
        """Serve no more. Idle threads end, and others when their streams do. Does not block."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._waiting.put(None)
            self._idle = 0

    def join(self) -> None:
        """After :meth:`close`: wait until all threads have ended."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self, stream: TcpStream | None) -> None:
        thread = threading.current_thread()
        try:
            while stream is not None:
                thread.name = self._serving(stream)
                self._serve(stream)
                thread.name = _IDLE_NAME
                stream = self._next()
        finally:
            with self._lock:
                self._threads.discard(thread)

    def _serving(self, stream: TcpStream) -> str:
        return f"{self._name}-{stream.peer}"

    def _next(self) -> TcpStream | None:
        """The next stream for this thread, which ends if there is none."""
        with self._lock:
            if self._closed or self._idle >= self._most_idle:
                return None
            self._idle += 1
        try:
            return self._waiting.get(timeout=self._linger_s)
        except Empty:
            pass
        with self._lock:
            if self._idle:
                self._idle -= 1
                return None
        # Somebody counts on every thread that waits, this one included.
        return self._waiting.get()
