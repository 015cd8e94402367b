"""A TCP proxy that stops passing bytes on, to catch a transfer half-way without luck."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

from transfer.addressing import parse_address

_CHUNK_BYTES = 64 << 10


class StallingProxy:
    """Passes ``limit_bytes`` from the target to clients, then waits for :meth:`resume`.

    What clients send passes freely. The limit counts all connections together.
    """

    def __init__(self, target: str, limit_bytes: int) -> None:
        address = parse_address(target)
        self._target = (address.host, address.port)
        self._left_bytes = limit_bytes
        self._wake = threading.Condition()
        self._stalled = True
        self._holds_back = False
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def holds_back(self) -> bool:
        """Whether it has kept something from a client so far."""
        return self._holds_back

    def stall(self) -> None:
        """Pass nothing more from now on until :meth:`resume`."""
        with self._wake:
            self._stalled = True
            self._left_bytes = 0

    def resume(self) -> None:
        """Pass everything on from now on."""
        with self._wake:
            self._stalled = False
            self._wake.notify_all()

    def close(self) -> None:
        """Cut every connection and join the threads."""
        with self._wake:
            self._closed = True
            self._stalled = False
            self._wake.notify_all()
        self.cut()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._server, *self._sockets):
            sock.close()

    def cut(self) -> None:
        """Cut the connections there are now."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="proxy")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._sockets.append(client)
            try:
                upstream = socket.create_connection(self._target)
            except OSError:
                client.shutdown(socket.SHUT_RDWR)
                continue
            self._sockets.append(upstream)
            if self._closed:
                self.cut()
            self._start(self._pass_on, client, upstream, False)
            self._start(self._pass_on, upstream, client, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if limited:
                    data = self._passed_first(sink, data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _passed_first(self, sink: socket.socket, data: bytes) -> bytes:
        """Pass on what the limit allows, wait, and give the rest."""
        with self._wake:
            allowed = min(len(data), self._left_bytes) if self._stalled else len(data)
            self._left_bytes -= allowed
            self._holds_back = self._holds_back or allowed < len(data)
        sink.sendall(data[:allowed])
        if allowed < len(data):
            with self._wake:
                while self._stalled:
                    self._wake.wait()
        return data[allowed:]
