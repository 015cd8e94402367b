"""The greeting, from both ends: each proves that it knows the secret of one hand-off.

The reader says which; the owner answers with its proof, so that a reader takes in no layout or
address of anybody else; the reader's own proof follows along with its first request, and has no
answer. Until it has come the reader is a stranger, of which nothing but these two messages is taken
in.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from transfer.errors import HandoffRefused, Phase, ProtocolError, TlsRefused, TransferError
from transfer.transports.base import OwnerService
from transfer.transports.tcp.connection import Connection, unexpected, unproven
from transfer.transports.tcp.places import Places
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.messages import MessageReader
from transfer.transports.tcp.wire.proofs import NONCE_BYTES, ConnectionProofs, same_proof
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials, ReaderProcess

_TLS_HANDSHAKE = b"\x16\x03"


def greet_owner(
    stream: TcpStream,
    address: str,
    reader: ReaderProcess,
    credentials: Credentials,
    deadline: float,
) -> Connection:
    """The reader's end.

    Args:
        deadline: monotonic time.

    Raises:
        OSError: the stream broke, ended or took too long.
        OwnerUnproven: what answers does not know the secret.
        ProtocolError: it does not speak this protocol.
        TransferError: what the owner answered.
    """
    hello = wire.encode_hello(reader, secrets.token_bytes(NONCE_BYTES), credentials.claim)
    stream.send(wire.message(MessageType.HELLO, 0, hello), deadline)
    answers = MessageReader(stream, stall_s=0)
    header, body = answers.next(deadline)
    if header.request_id or not answers.empty:
        raise unexpected(header, address)
    if header.type is MessageType.ERROR:
        raise wire.decode_error(body, Phase.CONNECT, address, credentials.handoff_id)
    if header.type is not MessageType.WELCOME:
        raise unexpected(header, address)
    proof, welcome = wire.split_proof(body)
    proofs, secret = ConnectionProofs(hello, welcome), credentials.secret
    if not same_proof(proof, proofs.of_answer(secret, MessageType.WELCOME, 0)):
        raise unproven(address)
    own = wire.message(MessageType.PROVE, 0, proofs.of_request(secret, MessageType.PROVE, 0))
    return Connection(stream, wire.decode_welcome(welcome), proofs, secret, own)


@dataclass(frozen=True, slots=True)
class ProvenReader:
    """A reader that has proved that it knows the secret of a hand-off."""

    process: ReaderProcess
    proofs: ConnectionProofs = field(repr=False)
    secret: str = field(repr=False)


def greet_reader(
    stream: TcpStream,
    messages: MessageReader,
    service: OwnerService,
    places: Places,
    deadline: float,
) -> ProvenReader:
    """The owner's end. The stream then has a place among those of the proven.

    Args:
        messages: of ``stream``.
        deadline: monotonic time when all of it must be over, TLS included.

    Raises:
        OSError: the stream broke, ended or took too long.
        ProtocolError: the peer sent something else.
        HandoffRefused: it did not prove what it claimed; that is not answered.
        TlsRefused: only one end speaks TLS, or the peer's certificate is not accepted.
        TransferError: the peer was answered why not.
    """
    stream.secure(max(0.0, deadline - time.monotonic()))
    places.heard(stream)
    _, body = _next(stream, messages, MessageType.HELLO, deadline)
    places.heard(stream)
    try:
        hello = wire.decode_hello(body)
        secret = service.secret_of(hello.claim)
        places.check_room()
    except TransferError as error:
        stream.send(wire.message(MessageType.ERROR, 0, wire.encode_error(error)), deadline)
        raise
    welcome = wire.encode_welcome(service.info(), secrets.token_bytes(NONCE_BYTES))
    proofs = ConnectionProofs(body, welcome)
    proof = proofs.of_answer(secret, MessageType.WELCOME, 0)
    stream.send(wire.message(MessageType.WELCOME, 0, proof, welcome), deadline)
    _, body = _next(stream, messages, MessageType.PROVE, deadline)
    if not same_proof(bytes(body), proofs.of_request(secret, MessageType.PROVE, 0)):
        raise HandoffRefused("wrong secret", phase=Phase.CONNECT, handoff_id=hello.claim.handoff_id)
    places.prove(stream)
    return ProvenReader(hello.reader, proofs, secret)


def _next(
    stream: TcpStream, messages: MessageReader, wanted: MessageType, deadline: float
) -> tuple[wire.Header, bytes | bytearray]:
    try:
        return messages.next(deadline, only=wanted)
    except ProtocolError:
        if not messages.first_bytes.startswith(_TLS_HANDSHAKE):
            raise
    refused = TlsRefused("this port does not speak TLS", phase=Phase.CONNECT)
    stream.send(wire.message(MessageType.ERROR, 0, wire.encode_error(refused)), deadline)
    stream.linger()
    raise refused
