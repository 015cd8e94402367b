"""The owner's side of TCP: accepts readers and sends them what they may read."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping

import numpy as np

from transfer import faults
from transfer.addressing import Address
from transfer.errors import (
    ConfigurationError,
    HandoffNotReady,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    ProtocolError,
    TlsRefused,
    TransferError,
    TransportUnavailable,
)
from transfer.settings import AUTO, MAX_SLICE_BYTES, TransferSettings
from transfer.spans import total_bytes
from transfer.transports import tcp_wire as wire
from transfer.transports.base import Attachment, Caller, Listener, OwnerService
from transfer.transports.socket_options import SocketOptions
from transfer.transports.span_cursor import SpanCursor
from transfer.transports.tcp_messages import MessageReader
from transfer.transports.tcp_stream import TcpStream
from transfer.transports.tcp_wire import Header, MessageType
from transfer.transports.tls import TlsContexts
from transfer.transports.tls_stream import TlsStream
from transfer.types import Credentials, SpanArray

logger = logging.getLogger(__name__)

_BACKLOG = 128
_TLS_HANDSHAKE = b"\x16\x03"


class TcpListener(Listener):
    """Listens on one port, with one thread per connection that sleeps in ``recv``.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        service: OwnerService,
        settings: TransferSettings,
        options: SocketOptions,
        tls: TlsContexts | None,
        others: Mapping[str, Listener],
    ) -> None:
        self._service = service
        self._options = options
        self._tls = tls
        self._others = others
        self._settings = settings
        self._lock = threading.Lock()
        self._closed = False
        self._connections: dict[TcpStream, threading.Thread] = {}
        try:
            self._socket = socket.create_server(
                (settings.host, settings.port),
                family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {settings.host} port {settings.port}: {error}",
                phase=Phase.CONNECT,
            ) from error
        self._address = str(Address("tcp", settings.host, self._socket.getsockname()[1]))
        self._thread = threading.Thread(target=self._accept, name="baton-accept", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._connections)} connections"
        return f"<TcpListener {self._address} {state}>"

    @property
    def address(self) -> str:
        return self._address

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._thread.join()
        self._socket.close()
        with self._lock:
            connections = dict(self._connections)
        for stream in connections:
            stream.shutdown()
        for thread in connections.values():
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                accepted, (host, port, *_) = self._socket.accept()
            except OSError as error:
                with self._lock:
                    closed = self._closed
                if closed:
                    return
                # Out of descriptors, or a client that was gone before it was accepted.
                logger.warning("cannot accept a connection: %s", error)
                threading.Event().wait(1.0)
                continue
            try:
                stream = self._stream(accepted, f"{host}:{port}")
            except OSError as error:
                accepted.close()
                logger.info("connection from %s:%s broke at once: %s", host, port, error)
                continue
            self._admit(stream)

    def _stream(self, accepted: socket.socket, peer: str) -> TcpStream:
        if self._tls is None:
            return TcpStream(accepted, peer, self._options)
        return TlsStream.accepted(self._tls, accepted, peer, self._options)

    def _admit(self, stream: TcpStream) -> None:
        thread = threading.Thread(
            target=self._serve, args=(stream,), name=f"baton-serve-{stream.peer}", daemon=True
        )
        limit, why_not = self._settings.max_connections, ""
        with self._lock:
            closed = self._closed
            if len(self._connections) >= limit:
                why_not = f"the owner has its {limit} connections"
            elif not closed:
                try:
                    # Under the lock, so that close() finds only threads that can be joined.
                    thread.start()
                    self._connections[stream] = thread
                except RuntimeError as error:
                    why_not = f"the owner: {error}"
        if closed:
            stream.close()
        elif why_not:
            self._turn_away(stream, why_not)

    def _turn_away(self, stream: TcpStream, why: str) -> None:
        logger.warning("connection from %s turned away: %s", stream.peer, why)
        busy = PeerUnreachable(why, phase=Phase.CONNECT)
        try:
            if stream.secured:
                # Fits the socket's empty buffer and so does not block.
                stream.send(wire.message(MessageType.ERROR, 0, wire.encode_error(busy)))
        except OSError:
            pass  # it is gone: nobody to tell
        finally:
            stream.close()

    def _serve(self, stream: TcpStream) -> None:
        try:
            _Conversation(stream, self._service, self._settings, self._others).run()
        except (ProtocolError, TlsRefused) as error:
            logger.warning("connection from %s closed: %s", stream.peer, error.message)
        except OSError as error:
            logger.debug("connection from %s ended: %s", stream.peer, error)
        finally:
            with self._lock:
                self._connections.pop(stream, None)
            stream.close()


class _Conversation:
    """Requests and answers of one connection, one after the other."""

    def __init__(
        self,
        stream: TcpStream,
        service: OwnerService,
        settings: TransferSettings,
        others: Mapping[str, Listener],
    ) -> None:
        self._stream = stream
        self._service = service
        self._others = others
        self._attachments: dict[str, Attachment] = {}
        self._stall_s = settings.stall_timeout_s
        # Of our own reads: the peers of one deployment have the same settings.
        self._streams = settings.streams_per_peer
        self._serves_reads = settings.transports == AUTO or "tcp" in settings.transports
        self._requests = MessageReader(stream, settings.stall_timeout_s)

    def run(self) -> None:
        """Serve until the stream ends.

        Raises:
            OSError: the stream ended or broke.
            ProtocolError: the peer sent something else than this protocol.
            TlsRefused: only one end speaks TLS, or the peer's certificate is not accepted.
        """
        try:
            self._converse()
        finally:
            for attachment in self._attachments.values():
                attachment.close()

    def _converse(self) -> None:
        stall_s = self._stall_s
        self._stream.secure(stall_s)
        self._stream.limit_sends(stall_s)
        header, body = self._first_message()
        if header.type is not MessageType.HELLO:
            raise ProtocolError(f"begins with {header.type.name}", phase=Phase.CONNECT)
        caller = wire.decode_hello(body)
        welcome = wire.encode_welcome(self._service.info())
        self._stream.send(wire.message(MessageType.WELCOME, header.request_id, welcome))
        while True:
            header, body = self._requests.next()
            try:
                self._answer(caller, header, body)
            except TransferError as error:
                answer = wire.encode_error(error)
                self._stream.send(wire.message(MessageType.ERROR, header.request_id, answer))
                if isinstance(error, ProtocolError):
                    raise
                expected = isinstance(error, HandoffNotReady | TransportUnavailable)
                level = logging.DEBUG if expected else logging.INFO
                logger.log(level, "refused %s of %s: %s", header.type.name, caller.peer, error)

    def _first_message(self) -> tuple[Header, bytes | bytearray]:
        try:
            return self._requests.next(time.monotonic() + self._stall_s)
        except ProtocolError:
            if not self._requests.first_bytes.startswith(_TLS_HANDSHAKE):
                raise
        refused = TlsRefused("this port does not speak TLS", phase=Phase.CONNECT)
        self._stream.send(wire.message(MessageType.ERROR, 0, wire.encode_error(refused)))
        self._stream.linger()
        raise refused

    def _answer(self, caller: Caller, header: Header, body: bytes | bytearray) -> None:
        match header.type:
            case MessageType.READ if self._serves_reads:
                self._read(caller, header.request_id, body)
                return
            case MessageType.BEGIN:
                answer = self._begin(caller, header.request_id, body)
            case MessageType.ATTACH:
                scheme, request = wire.decode_attach(body)
                answered = self._attachment(caller, scheme).exchange(request)
                answer = wire.message(MessageType.ATTACHED, header.request_id, answered)
            case MessageType.RELEASE:
                credentials, read_id, used = wire.decode_release(body)
                self._service.release(credentials, used=used, read_id=read_id)
                answer = wire.message(MessageType.OK, header.request_id)
            case MessageType.RENEW:
                renewed = wire.encode_renewed(list(map(self._renew, wire.decode_renew(body))))
                answer = wire.message(MessageType.RENEWED, header.request_id, renewed)
            case MessageType.ABORT:
                credentials, reason = wire.decode_abort(body)
                self._service.abort_by_reader(credentials, reason)
                answer = wire.message(MessageType.OK, header.request_id)
            case MessageType.READ:
                raise TransportUnavailable(
                    "the owner's settings forbid it to be read this way", phase=Phase.READ
                )
            case _:
                raise ProtocolError(f"{header.type.name} is no request", phase=Phase.READ)
        self._stream.send(answer)

    def _renew(self, credentials: Credentials) -> bool:
        try:
            self._service.renew(credentials)
        except (HandoffRefused, HandoffNotReady):
            return False
        return True

    def _begin(self, caller: Caller, request_id: int, body: bytes | bytearray) -> bytes:
        credentials, read_id, keys_of, spans = wire.decode_begin(body)
        self._service.begin_one_sided_read(caller, credentials, spans, read_id)
        if not keys_of:
            return wire.message(MessageType.OK, request_id)
        keys = self._attachment(caller, keys_of).keys(spans)
        return wire.message(MessageType.KEYS, request_id, keys)

    def _attachment(self, caller: Caller, scheme: str) -> Attachment:
        attachment = self._attachments.get(scheme)
        if attachment is None:
            listener = self._others.get(scheme)
            if listener is None:
                raise TransportUnavailable(
                    f"the owner does not serve {scheme:.20}", phase=Phase.CONNECT
                )
            attachment = self._attachments[scheme] = listener.attach(caller)
        return attachment

    def _read(self, caller: Caller, request_id: int, body: bytes | bytearray) -> None:
        credentials, spans = wire.decode_read(body)
        permit = self._service.begin_read(caller, credentials, spans, self._stream.shutdown)
        try:
            faults.reach("owner.sending")
            head, rows = _with_header(request_id, spans)
            with self._stream.beside_peer(self._streams, total_bytes(spans)):
                whole = self._stream.send_spans(SpanCursor(rows), lambda: permit.valid)
            del head
        finally:
            self._service.end_read(permit)
        if not whole:
            raise ConnectionAbortedError("the hand-off ended while it was read")


def _with_header(
    request_id: int, spans: SpanArray
) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], SpanArray]:
    """Rows that begin with a DATA header, and the buffer of the header, which must outlive them."""
    size = total_bytes(spans)
    if size > MAX_SLICE_BYTES:
        raise ProtocolError(
            f"READ of {size} bytes, at most {MAX_SLICE_BYTES} go at once", phase=Phase.READ
        )
    head = np.frombuffer(
        bytearray(wire.encode_header(MessageType.DATA, request_id, size)), np.uint8
    )
    rows = np.empty((spans.shape[0] + 1, 2), dtype=np.uint64)
    rows[0] = (head.ctypes.data, head.size)
    rows[1:] = spans
    return head, rows
