"""Connecting to an owner: address, TLS if it is wanted, handshake."""

from __future__ import annotations

import time

from transfer.addressing import parse_address
from transfer.errors import DeadlineExceeded, Phase
from transfer.settings import TransferSettings
from transfer.transports.tcp.connection import Connection
from transfer.transports.tcp.greeting import greet_owner
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.stream import TcpStream, translated
from transfer.transports.tcp.streams.tls import TlsContexts
from transfer.transports.tcp.streams.tls_stream import TlsStream
from transfer.types import Credentials, ReaderProcess


class Dialer:
    """Opens connections by the settings of one engine. Thread-safe."""

    def __init__(
        self, settings: TransferSettings, options: SocketOptions, tls: TlsContexts | None
    ) -> None:
        self._settings = settings
        self._options = options
        self._tls = tls

    def connect(
        self, address: str, reader: ReaderProcess, credentials: Credentials, timeout_s: float
    ) -> Connection:
        """A connection to who knows the secret in ``credentials``, within ``timeout_s``.

        Raises:
            PeerUnreachable: nobody listens there, or the connection broke.
            DeadlineExceeded: not within ``timeout_s``.
            ProtocolError: what answers does not speak this protocol.
            OwnerUnproven: it does not know the secret.
            TlsRefused: only one end speaks TLS, or a certificate is not accepted.
            HandoffRefused: the owner does not know the hand-off.
            HandoffNotReady: it will, soon.
        """
        timeout_s = min(timeout_s, self._settings.connect_timeout_s)
        if timeout_s <= 0:
            raise DeadlineExceeded("no time left to connect", phase=Phase.CONNECT, peer=address)
        deadline = time.monotonic() + timeout_s
        with translated(Phase.CONNECT, address):
            stream = self._open(address, timeout_s)
            greeted = False
            try:
                connection = greet_owner(stream, address, reader, credentials, deadline)
                greeted = True
                return connection
            finally:
                if not greeted:
                    stream.close()

    def _open(self, address: str, timeout_s: float) -> TcpStream:
        target = parse_address(address)
        if self._tls is None:
            return TcpStream.connect(target.host, target.port, timeout_s, self._options)
        return TlsStream.connect_with(self._tls, target.host, target.port, timeout_s, self._options)
