"""Connecting to an owner: address, TLS if it is wanted, handshake."""

from __future__ import annotations

import time

from transfer.addressing import parse_address
from transfer.errors import DeadlineExceeded, Phase, ProtocolError
from transfer.settings import TransferSettings
from transfer.transports import tcp_wire as wire
from transfer.transports.base import Caller
from transfer.transports.socket_options import SocketOptions
from transfer.transports.tcp_messages import MessageReader
from transfer.transports.tcp_stream import TcpStream, translated
from transfer.transports.tcp_wire import Header, MessageType
from transfer.transports.tls import TlsContexts
from transfer.transports.tls_stream import TlsStream
from transfer.types import PeerInfo


class Dialer:
    """Opens connections by the settings of one engine. Thread-safe."""

    def __init__(
        self, settings: TransferSettings, options: SocketOptions, tls: TlsContexts | None
    ) -> None:
        self._settings = settings
        self._options = options
        self._tls = tls

    def connect(self, address: str, caller: Caller, timeout_s: float) -> tuple[TcpStream, PeerInfo]:
        """A connection, and who answered on it, within ``timeout_s``.

        Raises:
            PeerUnreachable: nobody listens there, or the connection broke.
            DeadlineExceeded: not within ``timeout_s``.
            ProtocolError: what answers does not speak this protocol.
            TlsRefused: only one end speaks TLS, or a certificate is not accepted.
        """
        timeout_s = min(timeout_s, self._settings.connect_timeout_s)
        if timeout_s <= 0:
            raise DeadlineExceeded("no time left to connect", phase=Phase.CONNECT, peer=address)
        deadline = time.monotonic() + timeout_s
        with translated(Phase.CONNECT, address):
            stream = self._open(address, timeout_s)
            shaken = False
            try:
                info = _shake_hands(stream, caller, address, deadline)
                shaken = True
                return stream, info
            finally:
                if not shaken:
                    stream.close()

    def _open(self, address: str, timeout_s: float) -> TcpStream:
        target = parse_address(address)
        if self._tls is None:
            return TcpStream.connect(target.host, target.port, timeout_s, self._options)
        return TlsStream.connect_with(self._tls, target.host, target.port, timeout_s, self._options)


def _shake_hands(stream: TcpStream, caller: Caller, address: str, deadline: float) -> PeerInfo:
    stream.send(wire.message(MessageType.HELLO, 0, wire.encode_hello(caller)), deadline)
    answers = MessageReader(stream, stall_s=0)
    header, body = answers.next(deadline)
    if header.request_id or not answers.empty:
        raise unexpected(header, address)
    if header.type is MessageType.ERROR:
        raise wire.decode_error(body, Phase.CONNECT, address)
    if header.type is not MessageType.WELCOME:
        raise unexpected(header, address)
    return wire.decode_welcome(body)


def unexpected(header: Header, peer: str) -> ProtocolError:
    return ProtocolError(
        f"unexpected {header.type.name} of {header.body_bytes} bytes in answer to request "
        f"{header.request_id}",
        phase=Phase.READ,
        peer=peer,
    )
