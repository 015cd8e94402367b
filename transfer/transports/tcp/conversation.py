"""The owner's side of one connection, once its reader has proved itself: requests and answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from transfer import faults
from transfer.errors import (
    HandoffNotReady,
    HandoffRefused,
    Phase,
    ProtocolError,
    TransferError,
    TransportUnavailable,
)
from transfer.settings import AUTO, MAX_SLICE_BYTES, TransferSettings
from transfer.spans import total_bytes
from transfer.transports.base import Attachment, Listener, OwnerService
from transfer.transports.tcp.greeting import ProvenReader
from transfer.transports.tcp.streams.span_cursor import SpanCursor
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.fields import encode_claim
from transfer.transports.tcp.wire.messages import MessageReader
from transfer.transports.tcp.wire.proofs import Buffer, same_proof
from transfer.transports.tcp.wire.protocol import Header, MessageType, Renewal

logger = logging.getLogger(__name__)

_CLAIMING = (MessageType.READ, MessageType.BEGIN, MessageType.RELEASE, MessageType.ABORT)
_OTHERS = (MessageType.ATTACH, MessageType.RENEW)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request of whoever knows ``secret``."""

    id: int
    secret: str = field(repr=False)
    proof: bytes = field(repr=False)
    content: memoryview


class Conversation:
    """Requests of one reader and their answers, one after the other."""

    def __init__(
        self,
        stream: TcpStream,
        messages: MessageReader,
        reader: ProvenReader,
        service: OwnerService,
        settings: TransferSettings,
        others: Mapping[str, Listener],
    ) -> None:
        self._stream = stream
        self._messages = messages
        self._reader = reader
        self._service = service
        self._others = others
        self._attachments: dict[str, Attachment] = {}
        # Of our own reads: the peers of one deployment have the same settings.
        self._streams = settings.streams_per_peer
        self._serves_reads = settings.transports == AUTO or "tcp" in settings.transports

    def run(self) -> None:
        """Serve until the stream ends.

        Raises:
            OSError: the stream ended or broke.
            ProtocolError: the peer sent something else than this protocol.
        """
        try:
            self._converse()
        finally:
            for attachment in self._attachments.values():
                attachment.close()

    def _converse(self) -> None:
        last_id = 0
        while True:
            header, body = self._messages.next()
            if header.request_id <= last_id:
                raise ProtocolError(
                    f"request {header.request_id} came after {last_id}", phase=Phase.READ
                )
            last_id = header.request_id
            try:
                self._answer(header, body)
            except TransferError as error:
                answer = wire.encode_error(error)
                self._stream.send(wire.message(MessageType.ERROR, header.request_id, answer))
                if isinstance(error, ProtocolError):
                    raise
                expected = isinstance(error, HandoffNotReady | TransportUnavailable)
                level = logging.DEBUG if expected else logging.INFO
                peer = self._reader.process.peer
                logger.log(level, "refused %s of %s: %s", header.type.name, peer, error)

    def _answer(self, header: Header, body: Buffer) -> None:
        request = self._proven(header, body)
        content = request.content
        match header.type:
            case MessageType.READ:
                self._read(request)
            case MessageType.BEGIN:
                self._begin(request)
            case MessageType.ATTACH:
                scheme, wanted = wire.decode_attach(content)
                answer = self._attachment(scheme).exchange(wanted)
                self._send(request, MessageType.ATTACHED, answer)
            case MessageType.RELEASE:
                claim, read_id, used = wire.decode_release(content)
                self._service.release(claim, used=used, read_id=read_id)
                self._send(request, MessageType.OK)
            case MessageType.RENEW:
                renewed = [self._renew(request, one) for one in wire.decode_renew(content)]
                self._send(request, MessageType.RENEWED, wire.encode_renewed(renewed))
            case MessageType.ABORT:
                claim, reason = wire.decode_abort(content)
                self._service.abort_by_reader(claim, reason)
                self._send(request, MessageType.OK)

    def _proven(self, header: Header, body: Buffer) -> _Request:
        """The request, before anything of it but its claim is looked at.

        Raises:
            HandoffRefused: there is no such hand-off, or the reader does not know its secret.
            HandoffNotReady: it will be offered.
            ProtocolError: it is no request.
        """
        if header.type not in (*_CLAIMING, *_OTHERS):
            raise ProtocolError(f"{header.type.name} is no request", phase=Phase.READ)
        proof, content = wire.split_proof(body)
        secret, handoff_id = self._reader.secret, ""
        if header.type in _CLAIMING:
            claim = wire.claim_of(content)
            secret, handoff_id = self._service.secret_of(claim), claim.handoff_id
        right = self._reader.proofs.of_request(secret, header.type, header.request_id, content)
        if not same_proof(proof, right):
            raise HandoffRefused("wrong secret", phase=Phase.READ, handoff_id=handoff_id)
        return _Request(header.request_id, secret, proof, content)

    def _send(self, request: _Request, type_: MessageType, content: bytes = b"") -> None:
        proof = self._proof(request, type_, content)
        self._stream.send(wire.message(type_, request.id, proof, content))

    def _proof(self, request: _Request, type_: MessageType, content: bytes) -> bytes:
        return self._reader.proofs.of_answer(
            request.secret, type_, request.id, request.proof, content
        )

    def _renew(self, request: _Request, renewal: Renewal) -> bool:
        claim = renewal.claim
        try:
            right = self._reader.proofs.of_request(
                self._service.secret_of(claim),
                MessageType.RENEW,
                request.id,
                encode_claim(claim),
            )
            if not same_proof(renewal.proof, right):
                return False
            self._service.renew(claim)
        except (HandoffRefused, HandoffNotReady):
            return False
        return True

    def _begin(self, request: _Request) -> None:
        claim, read_id, keys_of, spans = wire.decode_begin(request.content)
        self._service.begin_one_sided_read(self._reader.process, claim, spans, read_id)
        if keys_of:
            self._send(request, MessageType.KEYS, self._attachment(keys_of).keys(spans))
        else:
            self._send(request, MessageType.OK)

    def _attachment(self, scheme: str) -> Attachment:
        attachment = self._attachments.get(scheme)
        if attachment is None:
            listener = self._others.get(scheme)
            if listener is None:
                raise TransportUnavailable(
                    f"the owner does not serve {scheme:.20}", phase=Phase.CONNECT
                )
            attachment = self._attachments[scheme] = listener.attach(self._reader.process)
        return attachment

    def _read(self, request: _Request) -> None:
        if not self._serves_reads:
            raise TransportUnavailable(
                "the owner's settings forbid it to be read this way", phase=Phase.READ
            )
        claim, spans = wire.decode_read(request.content)
        permit = self._service.begin_read(self._reader.process, claim, spans, self._stream.shutdown)
        try:
            faults.reach("owner.sending")
            size = total_bytes(spans)
            head = self._head(request, size)
            rows = np.empty((spans.shape[0] + 1, 2), dtype=np.uint64)
            rows[0] = (head.ctypes.data, head.size)
            rows[1:] = spans
            with self._stream.beside_peer(self._streams, size):
                whole = self._stream.send_spans(SpanCursor(rows), lambda: permit.valid)
            del head  # its memory was read until now
        finally:
            self._service.end_read(permit)
        if not whole:
            raise ConnectionAbortedError("the hand-off ended while it was read")

    def _head(self, request: _Request, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """What comes before the ``size`` bytes of a DATA."""
        if size > MAX_SLICE_BYTES:
            raise ProtocolError(
                f"READ of {size} bytes, at most {MAX_SLICE_BYTES} go at once", phase=Phase.READ
            )
        proof = self._proof(request, MessageType.DATA, wire.data_content(size))
        header = wire.encode_header(MessageType.DATA, request.id, len(proof) + size)
        return np.frombuffer(bytearray(header + proof), np.uint8)
