"""A greeted connection to an owner, as its reader has it: questions and answers with proofs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from transfer.errors import OwnerUnproven, Phase, ProtocolError
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.fields import encode_claim
from transfer.transports.tcp.wire.proofs import Buffer, ConnectionProofs, same_proof
from transfer.transports.tcp.wire.protocol import Header, MessageType, Renewal
from transfer.types import Credentials, PeerInfo


class Question(NamedTuple):
    """A request under way: what its answer is checked against."""

    id: int
    secret: str
    proof: bytes

    def __repr__(self) -> str:
        return f"<Question {self.id}>"


class Connection:
    """One connection, for one thread at a time.

    Args:
        info: what the owner said of itself, with proof that it knows ``secret``.
        secret: of the hand-off with which the two ends greeted each other.
        unsaid: ends the greeting, along with the first request: the owner wakes up once.
    """

    def __init__(
        self,
        stream: TcpStream,
        info: PeerInfo,
        proofs: ConnectionProofs,
        secret: str,
        unsaid: bytes = b"",
    ) -> None:
        self.stream = stream
        self.info = info
        self._proofs = proofs
        self._secret = secret
        self._unsaid = unsaid
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Connection {self.info.peer} {self.stream!r}>"

    def ask(
        self, type_: MessageType, content: Buffer, secret: str = "", deadline: float | None = None
    ) -> Question:
        """Send a request.

        Args:
            secret: of the hand-off that it claims; empty if it claims none.
            deadline: see :meth:`TcpStream.send`.

        Raises:
            OSError: the stream broke, or it took too long.
        """
        return self._ask(next(self._ids), type_, content, secret or self._secret, deadline)

    def ask_to_renew(self, credentials: Sequence[Credentials], deadline: float) -> Question:
        """Send a RENEW under the secret of the greeting, each claim with a proof of its own.

        Raises:
            OSError: as for :meth:`ask`.
            ProtocolError: a claim cannot be sent, or there are too many; nothing was.
        """
        number = next(self._ids)
        renewals = [self._renewal(one, number) for one in credentials]
        content = wire.encode_renew(renewals)
        return self._ask(number, MessageType.RENEW, content, self._secret, deadline)

    def end_greeting(self, deadline: float | None = None) -> None:
        """For who will ask nothing for a while: to the owner this is a stranger till then.

        Raises:
            OSError: as for :meth:`ask`.
        """
        if self._unsaid:
            self._send(b"", deadline)

    def check(self, question: Question, type_: MessageType, proof: bytes, content: Buffer) -> None:
        """See that an answer is of who knows the secret.

        Raises:
            OwnerUnproven: it is not.
        """
        right = self._proofs.of_answer(question.secret, type_, question.id, question.proof, content)
        if not same_proof(proof, right):
            raise unproven(str(self.info.peer))

    def _ask(
        self,
        number: int,
        type_: MessageType,
        content: Buffer,
        secret: str,
        deadline: float | None,
    ) -> Question:
        proof = self._proofs.of_request(secret, type_, number, content)
        self._send(wire.message(type_, number, proof, content), deadline)
        return Question(number, secret, proof)

    def _send(self, message: bytes, deadline: float | None) -> None:
        unsaid, self._unsaid = self._unsaid, b""
        self.stream.send(unsaid + message if unsaid else message, deadline)

    def _renewal(self, credentials: Credentials, number: int) -> Renewal:
        claim = credentials.claim
        proof = self._proofs.of_request(
            credentials.secret, MessageType.RENEW, number, encode_claim(claim)
        )
        return Renewal(claim, proof)


def unproven(peer: str) -> OwnerUnproven:
    return OwnerUnproven(
        "what answers has not proved that it knows the ticket's secret",
        phase=Phase.CONNECT,
        peer=peer,
    )


def unexpected(header: Header, peer: str) -> ProtocolError:
    return ProtocolError(
        f"unexpected {header.type.name} of {header.body_bytes} bytes in answer to request "
        f"{header.request_id}",
        phase=Phase.READ,
        peer=peer,
    )
