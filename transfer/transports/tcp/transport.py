"""The reader's side of TCP: several data streams per peer, besides the control connection.

A read takes streams for itself alone, so that stopping it cannot disturb another one. Requests
for the slices of a read come from one queue that its streams share, and each stream asks for its
next slice before it takes in the one before.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from transfer.errors import FatalError, HandoffNotReady, PeerUnreachable, Phase, TransferError
from transfer.settings import TransferSettings
from transfer.spans import slice_plan, total_bytes
from transfer.transports.base import (
    ControlChannel,
    ControlTransport,
    DataChannel,
    Listener,
    OwnerService,
    ReadSession,
)
from transfer.transports.interrupt import Interrupt
from transfer.transports.tcp.connection import Connection, Question, unexpected
from transfer.transports.tcp.control import TcpControl
from transfer.transports.tcp.dialer import Dialer
from transfer.transports.tcp.listener import TcpListener
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.span_cursor import SpanCursor
from transfer.transports.tcp.streams.stream import translated
from transfer.transports.tcp.streams.tls import TlsContexts
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import PROOF_BYTES
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials, PeerInfo, ReaderProcess, ReadPlan

_PIPELINED_REQUESTS = 2
_MAX_REQUEST_ROWS = 2048
# What the smallest buffers of Linux hold, 4608 bytes.
_MIN_REQUEST_ROWS = 64
_BUFFER_BYTES_PER_ROW = 32
_MIN_SLICE_BYTES = 1 << 20


class TcpTransport(ControlTransport):
    """TCP by the settings of the engine, with TLS if they ask for it.

    Raises:
        ConfigurationError: the files for TLS or the congestion control cannot be used.
    """

    scheme = "tcp"

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._tls = TlsContexts.of(settings)
        self._options = SocketOptions.of(settings)
        self._dialer = Dialer(settings, self._options, self._tls)
        self.encrypts = self._tls is not None

    def listen(
        self, service: OwnerService, others: Mapping[str, Listener] | None = None
    ) -> Listener:
        return TcpListener(service, self._settings, self._options, self._tls, others or {})

    def open_control(
        self, address: str, reader: ReaderProcess, credentials: Credentials, timeout_s: float
    ) -> TcpControl:
        return TcpControl(self._dialer.connect(address, reader, credentials, timeout_s))

    def open_data(self, address: str, reader: ReaderProcess, control: ControlChannel) -> TcpData:
        # Control is not needed before the end of the first read.
        control.settle(self._settings.connect_timeout_s)
        return TcpData(address, reader, control.info, self._settings, self._dialer)


class TcpData(DataChannel):
    """A pool of data streams to one owner."""

    def __init__(
        self,
        address: str,
        reader: ReaderProcess,
        info: PeerInfo,
        settings: TransferSettings,
        dialer: Dialer,
    ) -> None:
        self._address = address
        self._reader = reader
        self._info = info
        self._settings = settings
        self._dialer = dialer
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<TcpData {self._info.peer} {state}>"

    def open_read(
        self, credentials: Credentials, plan: ReadPlan, timeout_s: float
    ) -> TcpReadSession:
        streams_wanted = self._settings.streams_per_peer
        size = total_bytes(plan.local)
        even_share = -(-size // (streams_wanted * 2))
        slice_bytes = min(self._settings.slice_bytes, max(_MIN_SLICE_BYTES, even_share))
        slices = deque(slice_plan(plan, slice_bytes, self._most_rows()))
        session = TcpReadSession(self, str(self._info.peer), credentials, slices)
        deadline = time.monotonic() + timeout_s
        try:
            for _ in range(min(streams_wanted, len(slices))):
                session.connections.append(self._take(credentials, deadline))
        except TransferError:
            session.close()
            raise
        return session

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.stream.close()

    def give_back(self, connection: Connection) -> None:
        """One without requests under way is free for the next read."""
        proven = False
        with suppress(OSError):  # it broke
            connection.end_greeting(time.monotonic() + self._settings.connect_timeout_s)
            proven = True
        with self._lock:
            kept = proven and not self._closed
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.stream.close()

    def _most_rows(self) -> int:
        """Of a request that fits the sockets' buffers: the owner does not take it in while it
        sends."""
        if not (buffer_bytes := self._settings.socket_buffer_bytes):
            return _MAX_REQUEST_ROWS
        return max(_MIN_REQUEST_ROWS, min(_MAX_REQUEST_ROWS, buffer_bytes // _BUFFER_BYTES_PER_ROW))

    def _take(self, credentials: Credentials, deadline: float) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        left_s = deadline - time.monotonic()
        connection = self._dialer.connect(self._address, self._reader, credentials, left_s)
        info = connection.info
        if (info.peer, info.incarnation) != (self._info.peer, self._info.incarnation):
            connection.stream.close()
            raise PeerUnreachable(
                f"now {info.peer} {info.incarnation} answers at {self._address}",
                phase=Phase.CONNECT,
                peer=str(self._info.peer),
            )
        return connection


class TcpReadSession(ReadSession):
    """One read over streams that are its own until it ends."""

    def __init__(
        self,
        channel: TcpData,
        peer: str,
        credentials: Credentials,
        slices: deque[ReadPlan],
    ) -> None:
        self.connections: list[Connection] = []
        self._channel = channel
        self._peer = peer
        self._credentials = credentials
        self._slices = slices
        self._total_bytes = sum(total_bytes(one.local) for one in slices)
        self._lock = threading.Lock()
        self._moved = 0
        self._error: TransferError | None = None
        self._out_of_step = False
        self._whole = True

    @property
    def bytes_moved(self) -> int:
        return self._moved

    def run(self, interrupt: Interrupt) -> None:
        self._whole = False
        with interrupt.watched_by(self._shut_down):
            self._drive_all()
        interrupt.check()
        if self._error is not None:
            self._whole = not self._out_of_step
            raise self._error
        if self._moved != self._total_bytes:
            raise FatalError(
                f"{self._moved} of {self._total_bytes} bytes came",
                phase=Phase.READ,
                peer=self._peer,
            )
        self._whole = True

    def close(self) -> None:
        connections, self.connections = self.connections, []
        for connection in connections:
            if self._whole:
                self._channel.give_back(connection)
            else:
                connection.stream.close()

    def _drive_all(self) -> None:
        helpers: list[threading.Thread] = []
        through = False
        try:
            for number, connection in enumerate(self.connections[1:], 1):
                helper = threading.Thread(
                    target=self._drive, args=(number, connection), name="baton-read", daemon=True
                )
                try:
                    helper.start()
                except RuntimeError:  # the system has no more: the others share its slices
                    break
                helpers.append(helper)
            if self.connections:
                self._drive(0, self.connections[0])
            through = True
        finally:
            if not through:
                self._shut_down()
            # A helper can only be in a call on its stream, which any error shuts down.
            for helper in helpers:
                helper.join()

    def _shut_down(self) -> None:
        for connection in self.connections:
            connection.stream.shutdown()

    def _drive(self, number: int, connection: Connection) -> None:
        streams = len(self.connections)
        try:
            with (
                translated(Phase.READ, self._peer, self._credentials.handoff_id),
                connection.stream.apart(number, streams, self._total_bytes // streams),
            ):
                self._transfer(connection)
        except HandoffNotReady as error:
            self._note(error)
        except TransferError as error:
            self._out_of_step = True
            self._note(error)
            self._shut_down()

    def _note(self, error: TransferError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    def _transfer(self, connection: Connection) -> None:
        claim, secret = self._credentials.claim, self._credentials.secret
        asked: deque[tuple[Question, SpanCursor]] = deque()
        not_ready: HandoffNotReady | None = None
        while True:
            while len(asked) < _PIPELINED_REQUESTS and (slice_ := self._next_slice()) is not None:
                content = wire.encode_read(claim, slice_.remote)
                question = connection.ask(MessageType.READ, content, secret)
                asked.append((question, SpanCursor(slice_.local)))
            if not asked:
                break
            question, cursor = asked.popleft()
            try:
                self._receive_slice(connection, question, cursor)
            except HandoffNotReady as error:
                # The answers still due are taken in: readers come back soon, for the same streams.
                not_ready = error
                self._slices.clear()
        if not_ready is not None:
            raise not_ready

    def _next_slice(self) -> ReadPlan | None:
        try:
            return self._slices.popleft()
        except IndexError:
            return None

    def _receive_slice(
        self, connection: Connection, question: Question, cursor: SpanCursor
    ) -> None:
        stream, size = connection.stream, cursor.total_bytes
        header = wire.decode_header(stream.receive(wire.HEADER.size))
        if header.request_id != question.id:
            raise unexpected(header, self._peer)
        if header.type is MessageType.ERROR:
            body = stream.receive(header.body_bytes)
            raise wire.decode_error(body, Phase.READ, self._peer, self._credentials.handoff_id)
        if header.type is not MessageType.DATA or header.body_bytes != PROOF_BYTES + size:
            raise unexpected(header, self._peer)
        proof = bytes(stream.receive(PROOF_BYTES))
        connection.check(question, MessageType.DATA, proof, wire.data_content(size))
        stream.receive_spans(cursor, self._count)

    def _count(self, moved: int) -> None:
        with self._lock:
            self._moved += moved
