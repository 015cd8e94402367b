"""Questions to an owner and its answers, one after the other, on one connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from transfer.errors import DeadlineExceeded, Phase, TransferError
from transfer.transports.base import ControlChannel
from transfer.transports.tcp.connection import Connection, Question, unexpected
from transfer.transports.tcp.streams.stream import translated
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.fields import MAX_READ_ROWS
from transfer.transports.tcp.wire.messages import MessageReader
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials, SpanArray

_Result = TypeVar("_Result")


class TcpControl(ControlChannel):
    """See :class:`~transfer.transports.base.ControlChannel`."""

    def __init__(self, connection: Connection) -> None:
        self.info = connection.info
        self._connection = connection
        self._answers = MessageReader(connection.stream, stall_s=0)
        self._peer = str(connection.info.peer)
        self._turn = threading.Lock()
        self._broken = False

    def __repr__(self) -> str:
        return f"<TcpControl {self._peer} {'broken' if self._broken else 'open'}>"

    @property
    def broken(self) -> bool:
        return self._broken

    @property
    def hangup_fd(self) -> int:
        return self._connection.stream.fd

    def exchange(self, scheme: str, request: bytes, timeout_s: float) -> bytes:
        body = wire.encode_attach(scheme, request)
        answer = self._call(
            lambda deadline: self._connection.ask(MessageType.ATTACH, body, deadline=deadline),
            MessageType.ATTACHED,
            timeout_s,
            Phase.CONNECT,
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
        for at in range(0, spans.shape[0], MAX_READ_ROWS):
            part = spans[at : at + MAX_READ_ROWS]
            body = wire.encode_begin(credentials.claim, read_id, keys_of, part)
            left_s = deadline - time.monotonic()
            answers.append(
                bytes(self._claim(MessageType.BEGIN, body, expected, left_s, credentials))
            )
        return answers if keys_of else []

    def release(
        self, credentials: Credentials, *, used: bool, read_id: str, timeout_s: float
    ) -> None:
        body = wire.encode_release(credentials.claim, used=used, read_id=read_id)
        self._claim(
            MessageType.RELEASE, body, MessageType.OK, timeout_s, credentials, Phase.CONFIRM
        )

    def renew(self, credentials: Sequence[Credentials], timeout_s: float) -> list[bool]:
        answer = self._call(
            lambda deadline: self._connection.ask_to_renew(credentials, deadline),
            MessageType.RENEWED,
            timeout_s,
            Phase.READ,
        )
        return wire.decode_renewed(answer, len(credentials))

    def abort(self, credentials: Credentials, reason: str, timeout_s: float) -> None:
        body = wire.encode_abort(credentials.claim, reason)
        self._claim(MessageType.ABORT, body, MessageType.OK, timeout_s, credentials)

    def settle(self, timeout_s: float) -> None:
        self._in_turn(self._connection.end_greeting, timeout_s, Phase.CONNECT)

    def shutdown(self) -> None:
        self._broken = True
        self._connection.stream.shutdown()

    def close(self) -> None:
        self.shutdown()
        with self._turn:
            self._connection.stream.close()

    def _claim(
        self,
        request: MessageType,
        body: bytes,
        expected: MessageType,
        timeout_s: float,
        credentials: Credentials,
        phase: Phase = Phase.READ,
    ) -> memoryview:
        """A request about one hand-off."""
        return self._call(
            lambda deadline: self._connection.ask(request, body, credentials.secret, deadline),
            expected,
            timeout_s,
            phase,
            credentials.handoff_id,
        )

    def _call(
        self,
        ask: Callable[[float], Question],
        expected: MessageType,
        timeout_s: float,
        phase: Phase,
        handoff_id: str = "",
    ) -> memoryview:
        """The answer to what ``ask`` asks, without its proof, which was the right one."""
        error, answer = self._in_turn(
            lambda deadline: self._exchange(ask, expected, deadline, phase, handoff_id),
            timeout_s,
            phase,
            handoff_id,
        )
        if error is not None:
            raise error
        return answer

    def _in_turn(
        self,
        work: Callable[[float], _Result],
        timeout_s: float,
        phase: Phase,
        handoff_id: str = "",
    ) -> _Result:
        """Do it alone on the connection, which is of no more use if that fails."""
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
                result = work(deadline)
            whole = True
            return result
        finally:
            if not whole:  # what comes next on this connection is unknown
                self._broken = True
            self._turn.release()

    def _exchange(
        self,
        ask: Callable[[float], Question],
        expected: MessageType,
        deadline: float,
        phase: Phase,
        handoff_id: str,
    ) -> tuple[TransferError | None, memoryview]:
        """The owner's error or its answer."""
        if self._broken:
            raise ConnectionAbortedError("the connection was shut down")
        question = ask(deadline)
        header, body = self._answers.next(deadline)
        if header.request_id != question.id:
            raise unexpected(header, self._peer)
        if header.type is MessageType.ERROR:
            return wire.decode_error(body, phase, self._peer, handoff_id), memoryview(b"")
        if header.type is not expected:
            raise unexpected(header, self._peer)
        proof, content = wire.split_proof(body)
        self._connection.check(question, expected, proof, content)
        return None, content
