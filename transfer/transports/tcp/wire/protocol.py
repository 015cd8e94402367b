"""The bytes of the TCP protocol, version 2. Pure: bytes in, values or ``ProtocolError`` out.

Every message is a header and a body. Numbers are little-endian.

======  =====  ===========================================================
offset  bytes  header field
======  =====  ===========================================================
0       4      magic ``BATN``
4       1      version
5       1      :class:`MessageType`
6       2      flags, 0
8       8      request id, repeated in the answer
16      8      body length
======  =====  ===========================================================

Text is a 16-bit length and UTF-8, all of it printable. A claim is the fence in 64 bits, the share
in 16 and one text: handoff_id, incarnation and reader with NUL between. Rows of spans are raw:
address and length, 64 bits each.

A connection begins with a greeting, in which each end proves that it knows the secret of one
hand-off, and nothing else is taken in before. HELLO has the reader's nonce and its claim of the
hand-off. WELCOME has the owner's proof and nonce. PROVE is the reader's proof; it has no answer,
and may come along with the first request.

From then on the body of every message but ERROR begins with a proof (see :mod:`.proofs`): under
the secret of the hand-off that a request claims, under that of the greeting in ATTACH and RENEW,
which claim none, and in an answer under that of its request. Each claim in a RENEW has a proof of
its own before it. A connection's request ids grow.

A READ is answered by DATA, whose body goes on with the bytes of the spans in the order of the
request and whose proof is for their number only, or by ERROR. Answers come in the order of the
requests. BEGIN asks leave to read the same spans by another transport, in which the owner takes no
part; its read id comes back in RELEASE. A BEGIN that names a transport is answered by KEYS, which
only that transport understands, as it alone does what ATTACH and ATTACHED hold.

Versions: 2 has proofs in the place of the secret, which had crossed in 1.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from enum import IntEnum, unique
from typing import NamedTuple

import numpy as np

from transfer.errors import (
    HandoffNotReady,
    HandoffRefused,
    LayoutMismatch,
    PeerUnreachable,
    Phase,
    ProtocolError,
    TlsRefused,
    TransferError,
    TransportUnavailable,
)
from transfer.printable import printable
from transfer.settings import MAX_SLICE_BYTES
from transfer.transports.tcp.wire.fields import (
    MAX_READ_ROWS,
    MAX_TEXT_BYTES,
    ROW_BYTES,
    U16,
    U32,
    Fields,
    encode_claim,
    encode_text,
    malformed,
)
from transfer.transports.tcp.wire.proofs import NONCE_BYTES, PROOF_BYTES, Buffer
from transfer.types import Claim, PeerId, PeerInfo, ReaderProcess, SpanArray

MAGIC = b"BATN"
VERSION = 2
HEADER = struct.Struct("<4sBBHQQ")

MAX_ADDRESSES = 16
MAX_LAYOUT_BYTES = 1 << 20
MAX_RENEWALS = 512

_U64 = struct.Struct("<Q")


@unique
class MessageType(IntEnum):
    HELLO = 1
    WELCOME = 2
    READ = 3
    DATA = 4
    RELEASE = 5
    RENEW = 6
    RENEWED = 7
    ABORT = 8
    OK = 9
    ERROR = 10
    BEGIN = 11
    KEYS = 12
    ATTACH = 13
    ATTACHED = 14
    PROVE = 15


_TYPES = {int(type_): type_ for type_ in MessageType}
_CONTROL_BODY_BYTES = 1 << 20
_MAX_BODY_BYTES = dict.fromkeys(MessageType, _CONTROL_BODY_BYTES) | {
    MessageType.HELLO: 4096,
    MessageType.WELCOME: MAX_LAYOUT_BYTES + 16384,
    MessageType.READ: MAX_READ_ROWS * ROW_BYTES + 4096,
    MessageType.BEGIN: MAX_READ_ROWS * ROW_BYTES + 4096,
    MessageType.DATA: MAX_SLICE_BYTES + PROOF_BYTES,
    MessageType.RELEASE: 4096,
    MessageType.ABORT: 4096,
    MessageType.OK: PROOF_BYTES,
    MessageType.PROVE: PROOF_BYTES,
    MessageType.ERROR: 4096,
}


@unique
class ErrorCode(IntEnum):
    """Why an owner did not do what was asked."""

    REFUSED = 1
    PROTOCOL = 2
    BUSY = 3
    LAYOUT = 4
    UNAVAILABLE = 5
    TLS = 6
    NOT_READY = 7


class Header(NamedTuple):
    type: MessageType
    request_id: int
    body_bytes: int


def encode_header(type_: MessageType, request_id: int, body_bytes: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, type_, 0, request_id, body_bytes)


def message(type_: MessageType, request_id: int, *body: Buffer) -> bytes:
    """Header and body, which may be given in parts."""
    return b"".join((encode_header(type_, request_id, sum(map(len, body))), *body))


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Read a header of exactly ``HEADER.size`` bytes; its body length is bounded by its type."""
    if len(data) != HEADER.size:
        raise malformed(f"header of {len(data)} bytes")
    magic, version, type_, flags, request_id, body_bytes = HEADER.unpack(data)
    if magic != MAGIC:
        raise malformed(f"begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise malformed(f"version {version}, this is version {VERSION}")
    known = _TYPES.get(type_)
    if known is None:
        raise malformed(f"unknown message type {type_}")
    if flags:
        raise malformed(f"unknown flags {flags:#x}")
    if body_bytes > _MAX_BODY_BYTES[known]:
        raise malformed(
            f"{known.name} of {body_bytes} bytes, at most {_MAX_BODY_BYTES[known]} are read"
        )
    return Header(known, request_id, body_bytes)


def split_proof(body: Buffer) -> tuple[bytes, memoryview]:
    """The proof that a body begins with, and the rest."""
    if len(body) < PROOF_BYTES:
        raise malformed(f"body of {len(body)} bytes has no proof, which takes {PROOF_BYTES}")
    whole = memoryview(body)
    return bytes(whole[:PROOF_BYTES]), whole[PROOF_BYTES:]


class Hello(NamedTuple):
    reader: ReaderProcess
    claim: Claim


def encode_hello(reader: ReaderProcess, nonce: bytes, claim: Claim) -> bytes:
    return b"".join(
        (
            nonce,
            encode_text(reader.peer.engine_id),
            U32.pack(reader.peer.rank),
            encode_text(reader.incarnation),
            encode_claim(claim),
        )
    )


def decode_hello(body: Buffer) -> Hello:
    fields = Fields(body)
    fields.skip(NONCE_BYTES)
    reader = ReaderProcess(PeerId(fields.text(), fields.u32()), fields.text())
    claim = fields.claim()
    fields.end()
    return Hello(reader, claim)


def encode_welcome(info: PeerInfo, nonce: bytes) -> bytes:
    return nonce + _encoded_info(info)


# An owner says the same of itself to everybody, and a reader hears it on every connection.
@functools.lru_cache(maxsize=4)
def _encoded_info(info: PeerInfo) -> bytes:
    if len(info.layout) > MAX_LAYOUT_BYTES:
        raise malformed(f"layout of {len(info.layout)} bytes, at most {MAX_LAYOUT_BYTES}")
    if len(info.addresses) > MAX_ADDRESSES:
        raise malformed(f"{len(info.addresses)} addresses, at most {MAX_ADDRESSES}")
    return b"".join(
        (
            encode_text(info.peer.engine_id),
            U32.pack(info.peer.rank),
            encode_text(info.incarnation),
            encode_text(info.layout_hash),
            U16.pack(len(info.addresses)),
            *map(encode_text, info.addresses),
            info.layout,
        )
    )


def decode_welcome(content: Buffer) -> PeerInfo:
    fields = Fields(content)
    fields.skip(NONCE_BYTES)
    return _decoded_info(fields.rest())


@functools.lru_cache(maxsize=16)
def _decoded_info(content: bytes) -> PeerInfo:
    fields = Fields(content)
    peer = PeerId(fields.text(), fields.u32())
    incarnation, layout_hash = fields.text(), fields.text()
    count = fields.u16()
    if count > MAX_ADDRESSES:
        raise malformed(f"{count} addresses, at most {MAX_ADDRESSES} are read")
    addresses = tuple(fields.text() for _ in range(count))
    layout = fields.rest()
    if len(layout) > MAX_LAYOUT_BYTES:
        raise malformed(f"layout of {len(layout)} bytes, at most {MAX_LAYOUT_BYTES} are read")
    return PeerInfo(peer, incarnation, layout_hash, layout, addresses)


def claim_of(content: Buffer) -> Claim:
    """That of a READ, BEGIN, RELEASE or ABORT, all of which begin with it."""
    return Fields(content).claim()


def encode_read(claim: Claim, spans: SpanArray) -> bytes:
    return b"".join((encode_claim(claim), np.ascontiguousarray(spans).data))


def decode_read(content: Buffer) -> tuple[Claim, SpanArray]:
    """Claim and remote spans; the spans are a copy and not checked against anything."""
    fields = Fields(content)
    return fields.claim(), fields.rows()


def data_content(size_bytes: int) -> bytes:
    """What the proof of a DATA is for, in the place of its bytes: how many there are."""
    return _U64.pack(size_bytes)


def encode_begin(claim: Claim, read_id: str, keys_of: str, spans: SpanArray) -> bytes:
    rows = np.ascontiguousarray(spans).data
    return b"".join((encode_claim(claim), encode_text(read_id), encode_text(keys_of), rows))


def decode_begin(content: Buffer) -> tuple[Claim, str, str, SpanArray]:
    """As :func:`decode_read`, with the read's id and whose keys are wanted."""
    fields = Fields(content)
    return fields.claim(), fields.text(), fields.text(), fields.rows()


def encode_attach(scheme: str, request: bytes) -> bytes:
    return encode_text(scheme) + request


def decode_attach(content: Buffer) -> tuple[str, bytes]:
    """The transport's scheme and its own bytes."""
    fields = Fields(content)
    return fields.text(), fields.rest()


def encode_release(claim: Claim, *, used: bool, read_id: str) -> bytes:
    return encode_claim(claim) + encode_text(read_id) + bytes([used])


def decode_release(content: Buffer) -> tuple[Claim, str, bool]:
    """Claim, the read's id and whether the bytes were used."""
    fields = Fields(content)
    claim, read_id, used = fields.claim(), fields.text(), fields.flag()
    fields.end()
    return claim, read_id, used


def encode_abort(claim: Claim, reason: str) -> bytes:
    return encode_claim(claim) + encode_text(_shortened(reason))


def decode_abort(content: Buffer) -> tuple[Claim, str]:
    fields = Fields(content)
    claim, reason = fields.claim(), fields.text()
    fields.end()
    return claim, reason


class Renewal(NamedTuple):
    claim: Claim
    proof: bytes


def encode_renew(renewals: Sequence[Renewal]) -> bytes:
    if len(renewals) > MAX_RENEWALS:
        raise malformed(f"{len(renewals)} renewals, at most {MAX_RENEWALS} go together")
    entries = [one.proof + encode_claim(one.claim) for one in renewals]
    return b"".join((U16.pack(len(entries)), *entries))


def decode_renew(content: Buffer) -> list[Renewal]:
    fields = Fields(content)
    count = fields.u16()
    if count > MAX_RENEWALS:
        raise malformed(f"{count} renewals, at most {MAX_RENEWALS} are read")
    renewals = []
    for _ in range(count):
        proof = fields.proof()
        renewals.append(Renewal(fields.claim(), proof))
    fields.end()
    return renewals


def encode_renewed(renewed: Sequence[bool]) -> bytes:
    return bytes(renewed)


def decode_renewed(content: Buffer, count: int) -> list[bool]:
    if len(content) != count or not set(content) <= {0, 1}:
        raise malformed(f"{len(content)} answers to {count} renewals, or not of 0 and 1")
    return [flag == 1 for flag in content]


def encode_error(error: TransferError) -> bytes:
    """Code and message; peer and hand-off are known to the other side."""
    if isinstance(error, LayoutMismatch):
        code = ErrorCode.LAYOUT
    elif isinstance(error, ProtocolError):
        code = ErrorCode.PROTOCOL
    elif isinstance(error, PeerUnreachable):
        code = ErrorCode.BUSY
    elif isinstance(error, TlsRefused):
        code = ErrorCode.TLS
    elif isinstance(error, TransportUnavailable):
        code = ErrorCode.UNAVAILABLE
    elif isinstance(error, HandoffNotReady):
        code = ErrorCode.NOT_READY
    else:
        code = ErrorCode.REFUSED
    return bytes([code]) + encode_text(_shortened(error.message))


def decode_error(
    body: bytes | bytearray, phase: Phase, peer: str, handoff_id: str = ""
) -> TransferError:
    """The owner's error as one of ours."""
    fields = Fields(body)
    code, text = fields.u8(), fields.text()
    fields.end()
    kinds: dict[int, type[TransferError]] = {
        ErrorCode.REFUSED: HandoffRefused,
        ErrorCode.PROTOCOL: ProtocolError,
        ErrorCode.BUSY: PeerUnreachable,
        ErrorCode.LAYOUT: LayoutMismatch,
        ErrorCode.TLS: TlsRefused,
        ErrorCode.UNAVAILABLE: TransportUnavailable,
        ErrorCode.NOT_READY: HandoffNotReady,
    }
    if code not in kinds:
        raise malformed(f"unknown error code {code}")
    return kinds[code](text, phase=phase, peer=peer, handoff_id=handoff_id)


def _shortened(text: str) -> str:
    """At most a few hundred characters, safe to encode."""
    return printable(text).encode()[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
