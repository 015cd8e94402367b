"""One TCP socket with TLS on it.

Python's ``ssl`` takes bytes side by side only, so data goes through a bounce buffer. Timeouts are
those of Python's sockets: under them ``ssl`` keeps to a deadline, which it does not under those of
the kernel.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

from transfer.errors import Phase, TlsRefused
from transfer.transports.tcp.streams.bounce import BounceBuffer
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.span_cursor import SpanCursor
from transfer.transports.tcp.streams.stream import TcpStream, tls_error
from transfer.transports.tcp.streams.tls import TlsContexts

_BOUNCE_BYTES = 256 << 10
_SHORTEST_WAIT_S = 0.001


class InTheClear(NamedTuple):
    """How a peer is known that does without TLS, and what it is told.

    Attributes:
        begins: its first bytes.
        answer: sent as it is.
    """

    begins: bytes
    answer: bytes


class TlsStream(TcpStream):
    """See :class:`TcpStream`; one thread at a time uses it, to send as well as to receive."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, options: SocketOptions) -> None:
        super().__init__(sock, peer, options)
        # Both ends have more to do than to copy, and better do it at the same time.
        self._gains_by_sharing = False
        self._tls = sock
        self._in_the_clear: InTheClear | None = None
        self._secured = False
        self._send_s: float | None = None
        self._bounce: BounceBuffer | None = None

    @classmethod
    def connect_with(
        cls, tls: TlsContexts, host: str, port: int, timeout_s: float, options: SocketOptions
    ) -> TlsStream:
        """Connect and shake hands.

        Raises:
            OSError: nobody answers there, or not within ``timeout_s`` (``TimeoutError``).
            TlsRefused: what answers does not speak TLS, or its certificate is not accepted.
        """
        deadline = time.monotonic() + timeout_s
        plain = socket.create_connection((host, port), timeout=timeout_s)
        stream = None
        try:
            sock = tls.client.wrap_socket(
                plain, server_hostname=tls.name_of(host), do_handshake_on_connect=False
            )
            plain = sock
            stream = cls(sock, f"{host}:{port}", options)
            stream._shake_hands(deadline)
            return stream
        finally:
            if stream is None or not stream.secured:
                plain.close()

    @classmethod
    def accepted(
        cls,
        tls: TlsContexts,
        plain: socket.socket,
        peer: str,
        options: SocketOptions,
        in_the_clear: InTheClear,
    ) -> TlsStream:
        """A stream on which :meth:`secure` has yet to be called. Does not block.

        Raises:
            OSError: the peer is gone.
        """
        sock = tls.server.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        try:
            stream = cls(sock, peer, options)
        except OSError:
            sock.close()
            raise
        stream._in_the_clear = in_the_clear
        return stream

    @property
    def secured(self) -> bool:
        return self._secured

    def secure(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._tls.settimeout(timeout_s)
        if self._in_the_clear is not None:
            self._refuse(self._in_the_clear)
        try:
            self._shake_hands(deadline)
        except TlsRefused:
            self.linger()
            raise

    def _refuse(self, in_the_clear: InTheClear) -> None:
        """Without taking what comes: the handshake, or the mistake."""
        first = socket.socket.recv(self._tls, len(in_the_clear.begins), socket.MSG_PEEK)
        if first == in_the_clear.begins:
            socket.socket.sendall(self._tls, in_the_clear.answer)
            self.linger()
            raise TlsRefused("does not speak TLS", phase=Phase.CONNECT, peer=self.peer)

    def _shake_hands(self, deadline: float) -> None:
        self._tls.settimeout(max(_SHORTEST_WAIT_S, deadline - time.monotonic()))
        try:
            self._tls.do_handshake()
        except ssl.SSLError as error:
            known = tls_error(error, Phase.CONNECT, self.peer)
            if isinstance(known, TlsRefused):
                raise known from error
            raise
        self._secured = True

    def limit_sends(self, seconds: float) -> None:
        self._send_s = seconds

    def send(self, data: bytes | memoryview, deadline: float | None = None) -> None:
        self._wait_at_most(self._send_s, deadline)
        self._tls.sendall(data)

    def receive_some(self, view: memoryview, deadline: float | None = None) -> int:
        self._wait_at_most(None, deadline)
        return super().receive_some(view)

    def receive_spans(self, cursor: SpanCursor, moved: Callable[[int], None]) -> None:
        bounce = self._buffer()
        for rows, size in cursor.slices(_BOUNCE_BYTES):
            self.receive_into(bounce.view[:size])
            bounce.scatter(rows)
            moved(size)

    def send_spans(self, cursor: SpanCursor, allowed: Callable[[], bool]) -> bool:
        bounce = self._buffer()
        for rows, _ in cursor.slices(_BOUNCE_BYTES):
            filled = bounce.gather(rows)
            if not allowed():
                return False
            self.send(filled)
        return True

    def _wait_at_most(self, timeout_s: float | None, deadline: float | None) -> None:
        if deadline is not None:
            timeout_s = max(_SHORTEST_WAIT_S, deadline - time.monotonic())
        if self._tls.gettimeout() != timeout_s:
            self._tls.settimeout(timeout_s)

    def _buffer(self) -> BounceBuffer:
        if self._bounce is None:
            self._bounce = BounceBuffer(_BOUNCE_BYTES)
        return self._bounce
