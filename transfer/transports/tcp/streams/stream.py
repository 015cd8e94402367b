"""One TCP socket: exact sends and receives, each until it is due, and what their errors mean."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from transfer.errors import DeadlineExceeded, PeerUnreachable, Phase, TlsRefused, TransferError
from transfer.transports.tcp.streams import processors
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.span_cursor import SpanCursor

# A plain integer: to combine the flags of ``socket`` costs more than a call with them.
_DONT_WAIT = int(socket.MSG_DONTWAIT)

_LINGER_S = 0.5
_LINGER_BYTES = 64 << 10


class TcpStream:
    """A connected socket.

    One thread at a time sends and one receives; ``shutdown`` may come from any thread. The file
    descriptor is closed by the thread that uses it, never under it, because its number would be
    given to another file at once.
    """

    def __init__(self, sock: socket.socket, peer: str, options: SocketOptions) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._closed = False
        self.peer = peer
        sock.setblocking(True)
        self._gains_by_sharing = options.apply(sock)

    def __repr__(self) -> str:
        return f"<TcpStream {self.peer} {'closed' if self._closed else 'open'}>"

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float, options: SocketOptions) -> TcpStream:
        """Connect.

        Raises:
            OSError: nobody answers there, or not within ``timeout_s`` (``TimeoutError``).
        """
        sock = socket.create_connection((host, port), timeout=timeout_s)
        try:
            return cls(sock, f"{host}:{port}", options)
        except OSError:
            sock.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor; -1 once closed."""
        return self._socket.fileno()

    def limit_sends(self, seconds: float) -> None:
        """Bound the time for which the peer may take in nothing of what is sent to it."""
        # A timeout of less than a microsecond would read as none.
        micros = max(1, round(seconds * 1e6))
        value = struct.pack("@ll", *divmod(micros, 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    @property
    def secured(self) -> bool:
        """Whether what is sent now is sent as it should be."""
        return True

    def secure(self, timeout_s: float) -> None:
        """Do what has to be done before the first message of an accepted connection.

        Raises:
            OSError: the stream broke or ended, or took too long (``TimeoutError``).
            TlsRefused: the peer has nothing to show.
        """

    def send(self, data: bytes | memoryview, deadline: float | None = None) -> None:
        """Send all of ``data``.

        Args:
            deadline: monotonic time when it must be on its way; without it :meth:`limit_sends`
                says how long it may take.

        Raises:
            OSError: the stream broke, or it took too long (``TimeoutError``, or
                ``BlockingIOError`` without a deadline).
        """
        if deadline is None:
            self._socket.sendall(data)
            return
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left, _DONT_WAIT) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def receive_some(self, view: memoryview, deadline: float | None = None) -> int:
        """Fill ``view`` with what is there, at least one byte; how many came.

        Args:
            deadline: monotonic time until which to wait for the first; for ever without it.

        Raises:
            OSError: the stream broke or ended (``ConnectionResetError``), or nothing came in time
                (``TimeoutError``).
        """
        if deadline is not None:
            self._wait(select.POLLIN, deadline)
        count = self._socket.recv_into(view)
        if not count:
            raise _ended()
        return count

    def receive_into(self, view: memoryview, deadline: float | None = None) -> None:
        """Fill ``view`` as :meth:`receive_some` does, all of it."""
        filled = 0
        while filled < len(view):
            filled += self.receive_some(view[filled:], deadline)

    def receive(self, count: int) -> bytearray:
        """The next ``count`` bytes; ``count`` was bounded by the caller."""
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return data

    def receive_spans(self, cursor: SpanCursor, moved: Callable[[int], None]) -> None:
        """Fill the cursor's spans from the stream, and tell ``moved`` of bytes that came."""
        while cursor.done_bytes < cursor.total_bytes:
            count = cursor.receive(self._socket.fileno(), socket.MSG_WAITALL)
            if not count:
                raise _ended()
            moved(count)

    def send_spans(self, cursor: SpanCursor, allowed: Callable[[], bool]) -> bool:
        """Send the cursor's spans; False when ``allowed`` said no before all was sent."""
        while cursor.done_bytes < cursor.total_bytes:
            if not allowed():
                return False
            cursor.send(self._socket.fileno(), socket.MSG_NOSIGNAL)
        return True

    def apart(self, number: int, streams: int, size_bytes: int) -> AbstractContextManager[None]:
        """See :func:`~transfer.transports.tcp.streams.processors.apart`; nothing between hosts."""
        if not self._gains_by_sharing:
            return nullcontext()
        return processors.apart(number, streams, size_bytes)

    def beside_peer(self, streams: int, size_bytes: int) -> AbstractContextManager[None]:
        """See :func:`transfer.transports.tcp.streams.processors.beside_peer`; as :meth:`apart`."""
        if not self._gains_by_sharing:
            return nullcontext()
        return processors.beside_peer(self._socket, streams, size_bytes)

    def shutdown(self) -> None:
        """End both directions: calls under way and later ones fail. Any thread; idempotent."""
        with self._lock:
            if not self._closed:
                with suppress(OSError):  # the peer ended it before
                    # Not that of a TLS socket, which would go on in the clear.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def linger(self) -> None:
        """Take in what the peer sent, for a moment: closing would destroy the answer to it."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            self._socket.settimeout(_LINGER_S)
            left = _LINGER_BYTES
            while left > 0 and (data := socket.socket.recv(self._socket, left)):
                left -= len(data)

    def close(self) -> None:
        """Free the descriptor. Only when no other thread is in a call. Idempotent."""
        with self._lock:
            self._closed = True
            self._socket.close()

    def _wait(self, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._socket.fileno(), event)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "nothing came or went")


@contextmanager
def translated(phase: Phase, peer: str, handoff_id: str = "") -> Iterator[None]:
    """Turns operating system errors of a stream, raised within the block, into ours."""
    try:
        yield
    except OSError as error:
        raise _ours(error, phase, peer, handoff_id) from error


def _ours(error: OSError, phase: Phase, peer: str, handoff_id: str) -> TransferError:
    if isinstance(error, TimeoutError | BlockingIOError):
        return DeadlineExceeded(
            f"no answer in time: {error}", phase=phase, peer=peer, handoff_id=handoff_id
        )
    if isinstance(error, ssl.SSLError):
        return tls_error(error, phase, peer, handoff_id)
    return PeerUnreachable(
        f"connection failed: {error}", phase=phase, peer=peer, handoff_id=handoff_id
    )


def tls_error(
    error: ssl.SSLError, phase: Phase, peer: str, handoff_id: str = ""
) -> PeerUnreachable | TlsRefused:
    """One of ours for one of OpenSSL's."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
        return PeerUnreachable(
            f"connection failed: {error}", phase=phase, peer=peer, handoff_id=handoff_id
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the certificate is not accepted: {error.verify_message or error}"
    else:
        why = f"TLS failed, does the other end speak it and trust ours? {error.reason or error}"
    return TlsRefused(why, phase=phase, peer=peer, handoff_id=handoff_id)


def _ended() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "closed by the peer")
