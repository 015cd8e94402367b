"""Taking messages out of a stream, whatever that is."""

from __future__ import annotations

import time
from typing import Protocol

from transfer.errors import Phase, ProtocolError
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.protocol import Header, MessageType

_HEADER_BYTES = wire.HEADER.size
# Of a body: bigger ones cost one more system call.
_LIKELY_BYTES = 4 << 10


class ByteStream(Protocol):
    """What messages are taken out of; methods raise ``OSError`` when it breaks, ends or stalls."""

    def receive_some(self, view: memoryview, deadline: float | None = None) -> int:
        """Fill ``view`` with what is there, at least one byte; how many came.

        Args:
            deadline: monotonic time until which to wait for the first; for ever without it.
        """
        ...

    def receive_into(self, view: memoryview, deadline: float | None = None) -> None:
        """As :meth:`receive_some`, all of ``view``."""
        ...


class MessageReader:
    """Takes in small messages with one system call each, or several with one.

    Used by one thread at a time. What it has taken from the stream nobody else will see there.

    Args:
        stall_s: how long the rest of a message may take once some of it is there.
    """

    def __init__(self, stream: ByteStream, stall_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._buffer = memoryview(bytearray(_HEADER_BYTES + _LIKELY_BYTES))
        self._begin = self._end = 0

    @property
    def empty(self) -> bool:
        """Whether it holds nothing of a further message."""
        return self._begin == self._end

    @property
    def first_bytes(self) -> bytes:
        """What it holds, not taken yet or refused."""
        return bytes(self._buffer[self._begin : self._end])

    def next(
        self, deadline: float | None = None, only: MessageType | None = None
    ) -> tuple[Header, bytes | bytearray]:
        """Header and body of the next message, not of DATA.

        Args:
            deadline: monotonic time when it must be whole. Without it, the first byte is waited for
                for ever, and the rest as long as it may stall.
            only: the one type that may come; the body of another one is not taken in.

        Raises:
            OSError: the stream broke, ended or stalled.
            ProtocolError: something else came.
        """
        if self._end - self._begin < _HEADER_BYTES:
            self._take_in_header(deadline)
        begin = self._begin + _HEADER_BYTES
        header = wire.decode_header(self._buffer[self._begin : begin])
        if only is not None and header.type is not only:
            raise ProtocolError(
                f"{header.type.name} of {header.body_bytes} bytes came, not {only.name}",
                phase=Phase.CONNECT,
            )
        end = begin + header.body_bytes
        if end > self._end:
            return header, self._rest_of_body(header, deadline)
        self._begin = end
        return header, bytes(self._buffer[begin:end])

    def _take_in_header(self, deadline: float | None) -> None:
        begun = self.first_bytes
        self._buffer[: len(begun)] = begun
        self._begin, self._end = 0, len(begun)
        while self._end < _HEADER_BYTES:
            if self._end and deadline is None:
                deadline = time.monotonic() + self._stall_s
            self._end += self._stream.receive_some(self._buffer[self._end :], deadline)

    def _rest_of_body(self, header: Header, deadline: float | None) -> bytearray:
        if header.type is MessageType.DATA:
            raise ProtocolError("DATA that was not asked for", phase=Phase.READ)
        begun = self._buffer[self._begin + _HEADER_BYTES : self._end]
        body = bytearray(header.body_bytes)
        body[: len(begun)] = begun
        if deadline is None:
            deadline = time.monotonic() + self._stall_s
        self._stream.receive_into(memoryview(body)[len(begun) :], deadline)
        self._begin = self._end = 0
        return body
