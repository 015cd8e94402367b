"""What relays between two ends of a connection share: they accept, and let go at the end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self


class ThreadedRelay:
    """Accepts connections on loopback from its start on, each served on a thread of its own; a
    context manager.

    Whoever inherits from it sets itself up before it calls this ``__init__``.

    Attributes:
        port: where it listens.
        address: the same, as transports write it.
    """

    def __init__(self) -> None:
        self._sockets_lock = threading.Lock()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut every connection and join the threads."""
        with self._sockets_lock:
            self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:  # which may begin others
            thread.join()
        for sock in (self._server, *self._sockets):
            sock.close()

    def cut(self) -> None:
        """Cut the connections there are now."""
        with self._sockets_lock:
            for sock in self._sockets:
                _shut(sock)

    def _serve(self, client: socket.socket) -> None:
        """What happens on a connection's thread; an ``OSError`` ends it."""
        raise NotImplementedError

    def _keep(self, sock: socket.socket) -> socket.socket:
        """Has a socket closed at the end; it is cut at once if that has come."""
        with self._sockets_lock:
            self._sockets.append(sock)
            if self._closed:
                _shut(sock)
        return sock

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=self._run, args=(target, *args), name="relay")
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _run(target: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(OSError):  # one of the ends, or the test, is through
            target(*args)

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            self._start(self._serve, self._keep(client))


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not as TLS would, which waits for the other end.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
