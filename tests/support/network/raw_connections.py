"""Both ends of a connection by hand: what a peer could send that does not keep to its part."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, NamedTuple

from transfer.addressing import parse_address
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import NONCE_BYTES, PROOF_BYTES, Buffer, ConnectionProofs
from transfer.transports.tcp.wire.protocol import Header, MessageType
from transfer.types import Credentials, PeerId, PeerInfo, ReaderProcess

NONCE = bytes(range(NONCE_BYTES))
STRANGER = ReaderProcess(PeerId("stranger", 0), "s-1")


class Message(NamedTuple):
    header: Header
    body: bytes


def connect(address: str) -> socket.socket:
    """To an owner at a ``tcp://`` address."""
    target = parse_address(address)
    return socket.create_connection((target.host, target.port), timeout=5)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None when the connection ended."""
    header = _exactly(sock, wire.HEADER.size)
    if len(header) < wire.HEADER.size:
        return None
    decoded = wire.decode_header(header)
    return Message(decoded, _exactly(sock, decoded.body_bytes))


def until_closed(sock: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    received = b""
    with suppress(ConnectionResetError):  # closed with our bytes unread
        while data := sock.recv(65_536):
            received += data
    return received


def hello(credentials: Credentials, nonce: bytes = NONCE) -> bytes:
    """The body of a reader's greeting."""
    return wire.encode_hello(STRANGER, nonce, credentials.claim)


def welcome(info: PeerInfo, greeting: bytes, secret: str) -> tuple[bytes, ConnectionProofs]:
    """An owner's answer to the greeting with body ``greeting``, as a message."""
    content = wire.encode_welcome(info, NONCE)
    proofs = ConnectionProofs(greeting, content)
    proof = proofs.of_answer(secret, MessageType.WELCOME, 0)
    return wire.message(MessageType.WELCOME, 0, proof, content), proofs


class RawReader:
    """Greets an owner like an honest reader and then sends what it is told to.

    Attributes:
        sock: for what is no message.
        sent: every byte so far.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.sock = connect(address)
        self.sent = b""
        self._credentials = credentials
        greeting = hello(credentials)
        self._send(wire.message(MessageType.HELLO, 0, greeting))
        answer = receive(self.sock)
        assert answer is not None
        assert answer.header.type is MessageType.WELCOME, answer
        self.proofs = ConnectionProofs(greeting, answer.body[PROOF_BYTES:])
        proof = self.proofs.of_request(credentials.secret, MessageType.PROVE, 0)
        self._send(wire.message(MessageType.PROVE, 0, proof))

    def __enter__(self) -> RawReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()

    def request(self, type_: MessageType, request_id: int, content: Buffer) -> bytes:
        """The message of a request, with the right proof."""
        proof = self.proofs.of_request(self._credentials.secret, type_, request_id, content)
        return wire.message(type_, request_id, proof, content)

    def ask(self, type_: MessageType, request_id: int, content: Buffer) -> None:
        self._send(self.request(type_, request_id, content))

    def receive(self) -> Message | None:
        return receive(self.sock)

    def _send(self, data: bytes) -> None:
        self.sent += data
        self.sock.sendall(data)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    with suppress(ConnectionResetError):
        while len(data) < count and (some := sock.recv(count - len(data))):
            data += some
    return data
