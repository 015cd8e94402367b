"""Somebody between a reader and an owner who understands every message, and may answer himself."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable

from tests.support.network.raw_connections import Message, connect, receive
from tests.support.network.relay import ThreadedRelay
from transfer.settings import TransferSettings
from transfer.transports.tcp.streams.tls import TlsContexts
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import PROOF_BYTES
from transfer.transports.tcp.wire.protocol import MessageType

Meddler = Callable[[Message], bytes | Message | None]
"""Gives, for a reader's message, the answer that the reader gets at once, or what goes to the owner
in its place; None passes it on."""

_GREETING = (MessageType.HELLO, MessageType.PROVE)
_ANSWERS = {
    MessageType.BEGIN: MessageType.OK,
    MessageType.RELEASE: MessageType.OK,
    MessageType.ABORT: MessageType.OK,
    MessageType.RENEW: MessageType.RENEWED,
    MessageType.ATTACH: MessageType.ATTACHED,
}


def pass_on(message: Message) -> None:
    """Meddle with nothing."""


def forged(message: Message, proof: bytes = bytes(PROOF_BYTES)) -> bytes:
    """What an owner would answer, with a proof of one's own."""
    type_, number, body = message.header.type, message.header.request_id, message.body
    if type_ is MessageType.READ:
        _, spans = wire.decode_read(body[PROOF_BYTES:])
        data = bytes(int(spans[:, 1].sum()))
        return wire.message(MessageType.DATA, number, proof, data)
    return wire.message(_ANSWERS[type_], number, proof)


def greet_only(message: Message) -> bytes | None:
    """Let the true owner greet, and answer everything else."""
    return None if message.header.type in _GREETING else forged(message)


class MeddlingRelay(ThreadedRelay):
    """Stands at an address where readers look for an owner.

    Args:
        owner: address of the true one.
        settings: with TLS it has a certificate that both ends accept.

    Attributes:
        seen: every byte that crossed, in the clear.
        messages: of readers, in order.
        answers: of the owner, in order.
    """

    def __init__(
        self, owner: str, meddle: Meddler = pass_on, settings: TransferSettings | None = None
    ) -> None:
        self.seen = bytearray()
        self.messages: list[Message] = []
        self.answers: list[Message] = []
        self._owner = owner
        self._meddle = meddle
        self._tls = TlsContexts.of(settings or TransferSettings())
        self._lock = threading.Lock()
        super().__init__()

    def _serve(self, client: socket.socket) -> None:
        reader, owner = client, self._keep(connect(self._owner))
        if self._tls is not None:
            reader = self._wrapped(self._tls.server, reader, server_side=True)
            owner = self._wrapped(
                self._tls.client, owner, server_hostname=self._tls.name_of("127.0.0.1")
            )
        while (message := receive(reader)) is not None:
            self._note(message)
            self.messages.append(message)
            meant = self._meddle(message)
            if isinstance(meant, bytes):
                reader.sendall(meant)
                continue
            owner.sendall(encoded(meant or message))
            if message.header.type is MessageType.PROVE:
                continue
            answer = receive(owner)
            if answer is None:
                break
            self._note(answer)
            self.answers.append(answer)
            reader.sendall(encoded(answer))
        for sock in (reader, owner):
            sock.shutdown(socket.SHUT_RDWR)

    def _wrapped(
        self, context: ssl.SSLContext, plain: socket.socket, **how: object
    ) -> socket.socket:
        return self._keep(context.wrap_socket(plain, **how))  # type: ignore[arg-type]

    def _note(self, message: Message) -> None:
        with self._lock:
            self.seen += encoded(message)


def encoded(message: Message) -> bytes:
    """A message as it crosses."""
    return wire.message(message.header.type, message.header.request_id, message.body)
