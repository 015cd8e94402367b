"""What the bodies of messages are made of: numbers, texts, claims and rows of spans. Pure."""

from __future__ import annotations

import functools
import struct

import numpy as np

from transfer.errors import Phase, ProtocolError
from transfer.transports.tcp.wire.proofs import PROOF_BYTES, Buffer
from transfer.types import Claim, SpanArray

MAX_READ_ROWS = 262_144
MAX_TEXT_BYTES = 512
ROW_BYTES = 16

U16 = struct.Struct("<H")
U32 = struct.Struct("<I")
# Fence, share and the length of the text.
_CLAIM = struct.Struct("<QHH")
_BETWEEN_TEXTS = "\0"
_CLAIM_TEXTS = 3


def encode_claim(claim: Claim) -> bytes:
    if not 0 <= claim.fence < 1 << 64:
        raise malformed(f"fence {claim.fence} does not fit 64 bits")
    if not 0 < claim.share < 1 << 16:
        raise malformed(f"share {claim.share} is not from 1 to {(1 << 16) - 1}")
    texts = (claim.handoff_id, claim.incarnation, claim.reader)
    _check_printable(*texts)
    data = _utf8(_BETWEEN_TEXTS.join(texts), _CLAIM_TEXTS * MAX_TEXT_BYTES)
    return _CLAIM.pack(claim.fence, claim.share, len(data)) + data


class Fields:
    """Takes a body apart from front to back."""

    def __init__(self, body: Buffer) -> None:
        self._body = body
        self._size = len(body)
        self._at = 0

    def _pass(self, count: int) -> int:
        """Where the next ``count`` bytes begin."""
        begin = self._at
        self._at = begin + count
        if self._at > self._size:
            raise malformed(f"body of {self._size} bytes ends within a field")
        return begin

    def _take(self, count: int) -> Buffer:
        begin = self._pass(count)
        return self._body[begin : self._at]

    def u8(self) -> int:
        return self._body[self._pass(1)]

    def u16(self) -> int:
        return int(U16.unpack_from(self._body, self._pass(U16.size))[0])

    def u32(self) -> int:
        return int(U32.unpack_from(self._body, self._pass(U32.size))[0])

    def flag(self) -> bool:
        value = self.u8()
        if value > 1:
            raise malformed(f"flag of value {value}")
        return value == 1

    def text(self) -> str:
        length = self.u16()
        if length > MAX_TEXT_BYTES:
            raise _too_long(length, MAX_TEXT_BYTES)
        text = _decoded(self._take(length))
        _check_printable(text)
        return text

    def claim(self) -> Claim:
        fence, share, length = _CLAIM.unpack_from(self._body, self._pass(_CLAIM.size))
        if length > _CLAIM_TEXTS * MAX_TEXT_BYTES:
            raise _too_long(length, _CLAIM_TEXTS * MAX_TEXT_BYTES)
        return _claim(fence, share, bytes(self._take(length)))

    def rows(self) -> SpanArray:
        size = self._size - self._at
        if size % ROW_BYTES or not 0 < size <= MAX_READ_ROWS * ROW_BYTES:
            raise malformed(f"spans of {size} bytes are not 1 to {MAX_READ_ROWS} rows")
        words = np.frombuffer(self._body, dtype="<u8", offset=self._at)
        self._at += size
        # In the body they lie at any address, which numpy is slow with.
        return words.reshape(-1, 2).copy()

    def proof(self) -> bytes:
        return bytes(self._take(PROOF_BYTES))

    def skip(self, count: int) -> None:
        self._pass(count)

    def rest(self) -> bytes:
        return bytes(self._take(self._size - self._at))

    def end(self) -> None:
        if self._at != self._size:
            raise malformed(f"{self._size - self._at} bytes too many in the body")


# All requests of a read have the same.
@functools.lru_cache(maxsize=256)
def _claim(fence: int, share: int, text: bytes) -> Claim:
    if not share:
        raise malformed("a claim with a share of 0")
    texts = _decoded(text).split(_BETWEEN_TEXTS)
    if len(texts) != _CLAIM_TEXTS:
        raise malformed(f"a claim of {len(texts)} texts, not {_CLAIM_TEXTS}")
    _check_printable(*texts)
    handoff_id, incarnation, reader = texts
    return Claim(handoff_id, incarnation, fence, reader, share)


def _decoded(data: Buffer) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise malformed("text is not UTF-8") from None


def _check_printable(*texts: str) -> None:
    """Both sides log what the other one said: it stays within its line and shows."""
    for text in texts:
        if not text.isprintable():
            raise malformed(f"text {text!r:.80} is not printable")


def encode_text(value: str) -> bytes:
    _check_printable(value)
    data = _utf8(value, MAX_TEXT_BYTES)
    return U16.pack(len(data)) + data


def _utf8(value: str, limit: int) -> bytes:
    data = value.encode()
    if len(data) > limit:
        raise malformed(f"text of {len(data)} bytes, at most {limit}")
    return data


def _too_long(length: int, limit: int) -> ProtocolError:
    return malformed(f"text of {length} bytes, at most {limit} are read")


def malformed(message: str) -> ProtocolError:
    return ProtocolError(message, phase=Phase.READ)
