"""The bytes of the TCP protocol, version 1. Pure: bytes in, values or ``ProtocolError`` out.

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

Text is a 16-bit length and UTF-8. Credentials are the fence in 64 bits, the share in 16 and one
text: handoff_id, incarnation, secret and reader with NUL between. Rows of spans are raw: address
and length, 64 bits each.

A READ is answered by DATA, whose body is the bytes of the spans in the order of the request, or
by ERROR. Answers come in the order of the requests. BEGIN asks leave to read the same spans by
another transport, in which the owner takes no part; its read id comes back in RELEASE. A BEGIN
that names a transport is answered by KEYS, which only that transport understands, as it alone does
the bodies of ATTACH and ATTACHED.
"""

from __future__ import annotations

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
from transfer.settings import MAX_SLICE_BYTES
from transfer.transports.base import Caller
from transfer.types import Credentials, PeerId, PeerInfo, SpanArray

MAGIC = b"BATN"
VERSION = 1
HEADER = struct.Struct("<4sBBHQQ")

MAX_ADDRESSES = 16
MAX_LAYOUT_BYTES = 1 << 20
MAX_READ_ROWS = 262_144
MAX_RENEWALS = 512
MAX_TEXT_BYTES = 512

_ROW_BYTES = 16
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
# Fence, share and the length of the text.
_CREDENTIALS = struct.Struct("<QHH")
_BETWEEN_TEXTS = "\0"
_CREDENTIAL_TEXTS = 4


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


_TYPES = {int(type_): type_ for type_ in MessageType}
_CONTROL_BODY_BYTES = 1 << 20
_MAX_BODY_BYTES = dict.fromkeys(MessageType, _CONTROL_BODY_BYTES) | {
    MessageType.HELLO: 4096,
    MessageType.WELCOME: MAX_LAYOUT_BYTES + 16384,
    MessageType.READ: MAX_READ_ROWS * _ROW_BYTES + 4096,
    MessageType.BEGIN: MAX_READ_ROWS * _ROW_BYTES + 4096,
    MessageType.DATA: MAX_SLICE_BYTES,
    MessageType.RELEASE: 4096,
    MessageType.ABORT: 4096,
    MessageType.OK: 0,
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


def message(type_: MessageType, request_id: int, body: bytes = b"") -> bytes:
    """Header and body."""
    return encode_header(type_, request_id, len(body)) + body


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Read a header of exactly ``HEADER.size`` bytes; its body length is bounded by its type."""
    if len(data) != HEADER.size:
        raise _malformed(f"header of {len(data)} bytes")
    magic, version, type_, flags, request_id, body_bytes = HEADER.unpack(data)
    if magic != MAGIC:
        raise _malformed(f"begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise _malformed(f"version {version}, this is version {VERSION}")
    known = _TYPES.get(type_)
    if known is None:
        raise _malformed(f"unknown message type {type_}")
    if flags:
        raise _malformed(f"unknown flags {flags:#x}")
    if body_bytes > _MAX_BODY_BYTES[known]:
        raise _malformed(
            f"{known.name} of {body_bytes} bytes, at most {_MAX_BODY_BYTES[known]} are read"
        )
    return Header(known, request_id, body_bytes)


def encode_hello(caller: Caller) -> bytes:
    return _text(caller.peer.engine_id) + _U32.pack(caller.peer.rank) + _text(caller.incarnation)


def decode_hello(body: bytes | bytearray) -> Caller:
    fields = _Fields(body)
    caller = Caller(PeerId(fields.text(), fields.u32()), fields.text())
    fields.end()
    return caller


def encode_welcome(info: PeerInfo) -> bytes:
    if len(info.layout) > MAX_LAYOUT_BYTES:
        raise _malformed(f"layout of {len(info.layout)} bytes, at most {MAX_LAYOUT_BYTES}")
    if len(info.addresses) > MAX_ADDRESSES:
        raise _malformed(f"{len(info.addresses)} addresses, at most {MAX_ADDRESSES}")
    return b"".join(
        (
            _text(info.peer.engine_id),
            _U32.pack(info.peer.rank),
            _text(info.incarnation),
            _text(info.layout_hash),
            _U16.pack(len(info.addresses)),
            *map(_text, info.addresses),
            info.layout,
        )
    )


def decode_welcome(body: bytes | bytearray) -> PeerInfo:
    fields = _Fields(body)
    peer = PeerId(fields.text(), fields.u32())
    incarnation, layout_hash = fields.text(), fields.text()
    count = fields.u16()
    if count > MAX_ADDRESSES:
        raise _malformed(f"{count} addresses, at most {MAX_ADDRESSES} are read")
    addresses = tuple(fields.text() for _ in range(count))
    layout = fields.rest()
    if len(layout) > MAX_LAYOUT_BYTES:
        raise _malformed(f"layout of {len(layout)} bytes, at most {MAX_LAYOUT_BYTES} are read")
    return PeerInfo(peer, incarnation, layout_hash, layout, addresses)


def encode_credentials(credentials: Credentials) -> bytes:
    if not 0 <= credentials.fence < 1 << 64:
        raise _malformed(f"fence {credentials.fence} does not fit 64 bits")
    if not 0 < credentials.share < 1 << 16:
        raise _malformed(f"share {credentials.share} is not from 1 to {(1 << 16) - 1}")
    text = _BETWEEN_TEXTS.join(
        (credentials.handoff_id, credentials.incarnation, credentials.secret, credentials.reader)
    )
    if text.count(_BETWEEN_TEXTS) != _CREDENTIAL_TEXTS - 1:
        raise _malformed("credentials with NUL in them")
    data = _utf8(text, _CREDENTIAL_TEXTS * MAX_TEXT_BYTES)
    return _CREDENTIALS.pack(credentials.fence, credentials.share, len(data)) + data


def encode_read(credentials: Credentials, spans: SpanArray) -> bytes:
    """Body of a READ."""
    return encode_credentials(credentials) + spans.tobytes()


def decode_read(body: bytes | bytearray) -> tuple[Credentials, SpanArray]:
    """Credentials and remote spans; the spans are a copy and not checked against anything."""
    fields = _Fields(body)
    return fields.credentials(), fields.rows()


def encode_begin(credentials: Credentials, read_id: str, keys_of: str, spans: SpanArray) -> bytes:
    # A thousand rows and more are common here: they are copied once and not twice.
    rows = np.ascontiguousarray(spans).data
    return b"".join((encode_credentials(credentials), _text(read_id), _text(keys_of), rows))


def decode_begin(body: bytes | bytearray) -> tuple[Credentials, str, str, SpanArray]:
    """As :func:`decode_read`, with the read's id and whose keys are wanted."""
    fields = _Fields(body)
    return fields.credentials(), fields.text(), fields.text(), fields.rows()


def encode_attach(scheme: str, request: bytes) -> bytes:
    return _text(scheme) + request


def decode_attach(body: bytes | bytearray) -> tuple[str, bytes]:
    """The transport's scheme and its own bytes."""
    fields = _Fields(body)
    return fields.text(), fields.rest()


def encode_release(credentials: Credentials, *, used: bool, read_id: str) -> bytes:
    return encode_credentials(credentials) + _text(read_id) + bytes([used])


def decode_release(body: bytes | bytearray) -> tuple[Credentials, str, bool]:
    """Credentials, the read's id and whether the bytes were used."""
    fields = _Fields(body)
    credentials, read_id, used = fields.credentials(), fields.text(), fields.flag()
    fields.end()
    return credentials, read_id, used


def encode_abort(credentials: Credentials, reason: str) -> bytes:
    return encode_credentials(credentials) + _text(_shortened(reason))


def decode_abort(body: bytes | bytearray) -> tuple[Credentials, str]:
    fields = _Fields(body)
    credentials, reason = fields.credentials(), fields.text()
    fields.end()
    return credentials, reason


def encode_renew(credentials: Sequence[Credentials]) -> bytes:
    if len(credentials) > MAX_RENEWALS:
        raise _malformed(f"{len(credentials)} renewals, at most {MAX_RENEWALS} go together")
    return _U16.pack(len(credentials)) + b"".join(map(encode_credentials, credentials))


def decode_renew(body: bytes | bytearray) -> list[Credentials]:
    fields = _Fields(body)
    count = fields.u16()
    if count > MAX_RENEWALS:
        raise _malformed(f"{count} renewals, at most {MAX_RENEWALS} are read")
    credentials = [fields.credentials() for _ in range(count)]
    fields.end()
    return credentials


def encode_renewed(renewed: Sequence[bool]) -> bytes:
    return bytes(renewed)


def decode_renewed(body: bytes | bytearray, count: int) -> list[bool]:
    if len(body) != count or not set(body) <= {0, 1}:
        raise _malformed(f"{len(body)} answers to {count} renewals, or not of 0 and 1")
    return [flag == 1 for flag in body]


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
    return bytes([code]) + _text(_shortened(error.message))


def decode_error(
    body: bytes | bytearray, phase: Phase, peer: str, handoff_id: str = ""
) -> TransferError:
    """The owner's error as one of ours."""
    fields = _Fields(body)
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
        raise _malformed(f"unknown error code {code}")
    return kinds[code](text, phase=phase, peer=peer, handoff_id=handoff_id)


class _Fields:
    """Takes a body apart from front to back."""

    def __init__(self, body: bytes | bytearray) -> None:
        self._body = body
        self._at = 0

    def _take(self, count: int) -> bytes | bytearray:
        upto = self._at + count
        if upto > len(self._body):
            raise _malformed(f"body of {len(self._body)} bytes ends within a field")
        taken = self._body[self._at : upto]
        self._at = upto
        return taken

    def u8(self) -> int:
        return self._take(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self._take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def flag(self) -> bool:
        value = self.u8()
        if value > 1:
            raise _malformed(f"flag of value {value}")
        return value == 1

    def text(self) -> str:
        return self._utf8(self.u16(), MAX_TEXT_BYTES)

    def credentials(self) -> Credentials:
        fence, share, length = _CREDENTIALS.unpack(self._take(_CREDENTIALS.size))
        if not share:
            raise _malformed("credentials with a share of 0")
        texts = self._utf8(length, _CREDENTIAL_TEXTS * MAX_TEXT_BYTES).split(_BETWEEN_TEXTS)
        if len(texts) != _CREDENTIAL_TEXTS:
            raise _malformed(f"credentials of {len(texts)} texts, not {_CREDENTIAL_TEXTS}")
        handoff_id, incarnation, secret, reader = texts
        return Credentials(handoff_id, incarnation, fence, secret, reader, share)

    def rows(self) -> SpanArray:
        size = len(self._body) - self._at
        if size % _ROW_BYTES or not 0 < size <= MAX_READ_ROWS * _ROW_BYTES:
            raise _malformed(f"spans of {size} bytes are not 1 to {MAX_READ_ROWS} rows")
        words = np.frombuffer(self._body, dtype="<u8", offset=self._at)
        self._at += size
        # In the body they lie at any address, which numpy is slow with.
        return words.reshape(-1, 2).copy()

    def rest(self) -> bytes:
        return bytes(self._take(len(self._body) - self._at))

    def end(self) -> None:
        if self._at != len(self._body):
            raise _malformed(f"{len(self._body) - self._at} bytes too many in the body")

    def _utf8(self, length: int, limit: int) -> str:
        if length > limit:
            raise _malformed(f"text of {length} bytes, at most {limit} are read")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _malformed("text is not UTF-8") from None


def _text(value: str) -> bytes:
    data = _utf8(value, MAX_TEXT_BYTES)
    return _U16.pack(len(data)) + data


def _utf8(value: str, limit: int) -> bytes:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise _malformed(f"{value!r} is not Unicode text") from None
    if len(data) > limit:
        raise _malformed(f"text of {len(data)} bytes, at most {limit}")
    return data


def _shortened(text: str) -> str:
    """At most a few hundred characters, safe to encode."""
    clean = text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    return clean.decode("utf-8", "ignore")


def _malformed(message: str) -> ProtocolError:
    return ProtocolError(message, phase=Phase.READ)
