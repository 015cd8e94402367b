"""Questions to an owner and its answers, one after the other, on one connection."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from transfer.errors import DeadlineExceeded, Phase
from transfer.transports import tcp_wire as wire
from transfer.transports.base import ControlChannel
from transfer.transports.tcp_dialer import unexpected
from transfer.transports.tcp_messages import MessageReader
from transfer.transports.tcp_stream import TcpStream, translated
from transfer.transports.tcp_wire import Header, MessageType
from transfer.types import Credentials, PeerInfo, SpanArray


class TcpControl(ControlChannel):
    """See :class:`~transfer.transports.base.ControlChannel`."""

    def __init__(self, stream: TcpStream, info: PeerInfo) -> None:
        self.info = info
        self._stream = stream
        self._answers = MessageReader(stream, stall_s=0)
        self._peer = str(info.peer)
        self._turn = threading.Lock()
        self._request_ids = itertools.count(1)
        self._broken = False

    def __repr__(self) -> str:
        return f"<TcpControl {self._peer} {'broken' if self._broken else 'open'}>"

    @property
    def broken(self) -> bool:
        return self._broken

    @property
    def hangup_fd(self) -> int:
        return self._stream.fd

    def exchange(self, scheme: str, request: bytes, timeout_s: float) -> bytes:
        body = wire.encode_attach(scheme, request)
        answer = self._call(
            MessageType.ATTACH, body, MessageType.ATTACHED, timeout_s, Phase.CONNECT
        )
        return bytes(answer)

    def begin_read(
        self,
        credentials: Credentials,
        spans: SpanArray,
        read_id: str,
        timeout_s: float,
        keys_of: str = "",
    ) -> list[bytes]:
        deadline = time.monotonic() + timeout_s
        expected = MessageType.KEYS if keys_of else MessageType.OK
        answers = []
        for at in range(0, spans.shape[0], wire.MAX_READ_ROWS):
            part = spans[at : at + wire.MAX_READ_ROWS]
            body = wire.encode_begin(credentials, read_id, keys_of, part)
            left_s = deadline - time.monotonic()
            answer = self._call(MessageType.BEGIN, body, expected, left_s, Phase.READ, credentials)
            answers.append(bytes(answer))
        return answers if keys_of else []

    def release(
        self, credentials: Credentials, *, used: bool, read_id: str, timeout_s: float
    ) -> None:
        body = wire.encode_release(credentials, used=used, read_id=read_id)
        self._call(MessageType.RELEASE, body, MessageType.OK, timeout_s, Phase.CONFIRM, credentials)

    def renew(self, credentials: Sequence[Credentials], timeout_s: float) -> list[bool]:
        body = wire.encode_renew(credentials)
        answer = self._call(MessageType.RENEW, body, MessageType.RENEWED, timeout_s, Phase.READ)
        return wire.decode_renewed(answer, len(credentials))

    def abort(self, credentials: Credentials, reason: str, timeout_s: float) -> None:
        body = wire.encode_abort(credentials, reason)
        self._call(MessageType.ABORT, body, MessageType.OK, timeout_s, Phase.READ, credentials)

    def shutdown(self) -> None:
        self._broken = True
        self._stream.shutdown()

    def close(self) -> None:
        self.shutdown()
        with self._turn:
            self._stream.close()

    def _call(
        self,
        request: MessageType,
        body: bytes,
        expected: MessageType,
        timeout_s: float,
        phase: Phase,
        credentials: Credentials | None = None,
    ) -> bytes | bytearray:
        handoff_id = credentials.handoff_id if credentials else ""
        deadline = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=max(0.0, timeout_s)):
            raise DeadlineExceeded(
                "other calls to the owner took too long",
                phase=phase,
                peer=self._peer,
                handoff_id=handoff_id,
            )
        whole = False
        try:
            with translated(phase, self._peer, handoff_id):
                header, answer = self._exchange(request, body, deadline)
            whole = header.type is expected or header.type is MessageType.ERROR
        finally:
            if not whole:  # what comes next on this connection is unknown
                self._broken = True
            self._turn.release()
        if header.type is MessageType.ERROR:
            raise wire.decode_error(answer, phase, self._peer, handoff_id)
        if not whole:
            raise unexpected(header, self._peer)
        return answer

    def _exchange(
        self, request: MessageType, body: bytes, deadline: float
    ) -> tuple[Header, bytes | bytearray]:
        if self._broken:
            raise ConnectionAbortedError("the connection was shut down")
        request_id = next(self._request_ids)
        self._stream.send(wire.message(request, request_id, body), deadline)
        header, answer = self._answers.next(deadline)
        if header.request_id != request_id:
            raise unexpected(header, self._peer)
        return header, answer
