"""A TCP proxy that stops passing bytes on, to catch a transfer half-way without luck."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.support.network.relay import ThreadedRelay
from transfer.addressing import parse_address

_CHUNK_BYTES = 64 << 10


class StallingProxy(ThreadedRelay):
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
        super().__init__()

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
        self.cut()
        self.resume()
        super().close()

    def _serve(self, client: socket.socket) -> None:
        try:
            upstream = self._keep(socket.create_connection(self._target))
        except OSError:
            client.shutdown(socket.SHUT_RDWR)
            return
        self._start(self._pass_on, client, upstream, False)
        self._pass_on(upstream, client, True)

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
