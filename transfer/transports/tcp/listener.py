"""The owner's side of TCP: accepts connections and gives each a thread and a place."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping

from transfer.addressing import Address
from transfer.errors import (
    ConfigurationError,
    HandoffNotReady,
    PeerUnreachable,
    Phase,
    ProtocolError,
    TlsRefused,
    TransferError,
)
from transfer.settings import TransferSettings
from transfer.transports.base import Listener, OwnerService
from transfer.transports.tcp.conversation import Conversation
from transfer.transports.tcp.greeting import greet_reader
from transfer.transports.tcp.places import Places
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.streams.tls import TlsContexts
from transfer.transports.tcp.streams.tls_stream import InTheClear, TlsStream
from transfer.transports.tcp.threads import ServingThreads
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.messages import MessageReader
from transfer.transports.tcp.wire.protocol import MessageType

logger = logging.getLogger(__name__)

_BACKLOG = 128

_WITHOUT_TLS = InTheClear(
    begins=wire.MAGIC,
    answer=wire.message(
        MessageType.ERROR,
        0,
        wire.encode_error(
            TlsRefused("this port needs TLS: tls_ca, tls_cert and tls_key", phase=Phase.CONNECT)
        ),
    ),
)


class TcpListener(Listener):
    """Listens on one port, with one thread for each connection that sleeps in ``recv``.

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
        self._places = Places(settings.max_connections)
        self._stranger_s = min(settings.connect_timeout_s, settings.stall_timeout_s)
        self._streams: set[TcpStream] = set()
        self._threads = ServingThreads("baton-serve", self._serve)
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
        state = "closed" if self._closed else f"{self._places.proven} connections"
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
        self._threads.close()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.shutdown()
        self._threads.join()

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
        return TlsStream.accepted(self._tls, accepted, peer, self._options, _WITHOUT_TLS)

    def _admit(self, stream: TcpStream) -> None:
        with self._lock:
            self._streams.add(stream)
        gone = self._places.enter(stream)
        if gone is not None:
            logger.info("connection from %s cut: it said nothing, and others wait", gone.peer)
            gone.shutdown()
        try:
            self._threads.serve(stream)
        except RuntimeError as error:
            self._turn_away(stream, f"the owner: {error}")
            self._forget(stream)

    def _turn_away(self, stream: TcpStream, why: str) -> None:
        try:
            logger.warning("connection from %s turned away: %s", stream.peer, why)
            if stream.secured:
                busy = wire.encode_error(PeerUnreachable(why, phase=Phase.CONNECT))
                # Fits the socket's empty buffer and so does not block.
                stream.send(wire.message(MessageType.ERROR, 0, busy))
        except OSError:
            pass  # it is gone: nobody to tell

    def _serve(self, stream: TcpStream) -> None:
        try:
            self._greet_and_converse(stream)
        except (ProtocolError, TlsRefused) as error:
            logger.warning("connection from %s closed: %s", stream.peer, error.message)
        except PeerUnreachable as error:
            logger.warning("connection from %s turned away: %s", stream.peer, error.message)
        except HandoffNotReady as error:
            logger.debug("connection from %s comes too soon: %s", stream.peer, error)
        except TransferError as error:
            logger.info("connection from %s refused: %s", stream.peer, error)
        except OSError as error:
            logger.debug("connection from %s ended: %s", stream.peer, error)
        finally:
            self._forget(stream)

    def _forget(self, stream: TcpStream) -> None:
        self._places.leave(stream)
        with self._lock:
            self._streams.discard(stream)
        stream.close()

    def _greet_and_converse(self, stream: TcpStream) -> None:
        messages = MessageReader(stream, self._settings.stall_timeout_s)
        until = time.monotonic() + self._stranger_s
        reader = greet_reader(stream, messages, self._service, self._places, until)
        stream.limit_sends(self._settings.stall_timeout_s)
        Conversation(stream, messages, reader, self._service, self._settings, self._others).run()
