"""What the two ends of queue pairs tell each other over the control connection.

Pure: bytes in, values or ``ProtocolError`` out. A request names the pairs of the reader, in order,
with the number of the owner's device that each should lead to, and the owner's pairs that are given
up, by name; the answer has the owner's pairs in the same order. Little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from transfer.errors import Phase, ProtocolError

SCHEME = "rdma"
VERSION = 1
MAX_PAIRS = 256

_HEAD = struct.Struct("<BHH")
_END = struct.Struct("<HBIIHBH16s")
_NUMBER = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class End:
    """One end of a queue pair to be connected.

    Attributes:
        rail: in a request the owner's device that is wanted, counted over and over again; in an
            answer the one that was taken.
        ethernet: RoCE, else InfiniBand.
        mtu: as verbs count it.
        reads: that this end can have asked for (reader) or can answer (owner) at once.
    """

    rail: int
    ethernet: bool
    number: int
    psn: int
    lid: int
    mtu: int
    reads: int
    gid: bytes

    @property
    def name(self) -> int:
        """32 bits that tell a pair from its owner's others: each device counts its own."""
        return self.rail << 24 | self.number


def encode_request(ends: Sequence[End], given_up: Sequence[int]) -> bytes:
    return b"".join(
        (
            _HEAD.pack(VERSION, len(ends), len(given_up)),
            *map(_encode_end, ends),
            *map(_NUMBER.pack, given_up),
        )
    )


def decode_request(data: bytes | bytearray) -> tuple[list[End], list[int]]:
    """Ends, and names of the owner's pairs that are given up."""
    if len(data) < _HEAD.size:
        raise _malformed(f"{len(data)} bytes")
    version, count, given_up = _HEAD.unpack_from(data)
    if version != VERSION:
        raise _malformed(f"version {version}, this is version {VERSION}")
    if count > MAX_PAIRS or given_up > MAX_PAIRS:
        raise _malformed(f"{count} pairs and {given_up} given up, at most {MAX_PAIRS} go at once")
    numbers_at = _HEAD.size + count * _END.size
    if len(data) != numbers_at + given_up * _NUMBER.size:
        raise _malformed(f"{count} pairs and {given_up} given up in {len(data)} bytes")
    ends = [_decode_end(data, _HEAD.size + at * _END.size) for at in range(count)]
    return ends, [number for (number,) in _NUMBER.iter_unpack(data[numbers_at:])]


def encode_answer(ends: Sequence[End]) -> bytes:
    return encode_request(ends, ())


def decode_answer(data: bytes | bytearray, count: int) -> list[End]:
    """As many ends as were asked for."""
    ends, given_up = decode_request(data)
    if len(ends) != count or given_up:
        raise _malformed(f"{len(ends)} pairs in answer to {count}")
    return ends


def _encode_end(end: End) -> bytes:
    return _END.pack(
        end.rail, end.ethernet, end.number, end.psn, end.lid, end.mtu, end.reads, end.gid
    )


def _decode_end(data: bytes | bytearray, at: int) -> End:
    rail, ethernet, number, psn, lid, mtu, reads, gid = _END.unpack_from(data, at)
    if rail >= MAX_PAIRS or number >= 1 << 24 or psn >= 1 << 24:
        raise _malformed("numbers out of range")
    if ethernet > 1 or not 1 <= mtu <= 5 or not reads:
        raise _malformed("numbers out of range")
    return End(rail, ethernet == 1, number, psn, lid, mtu, reads, gid)


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(f"queue pairs: {what}", phase=Phase.CONNECT)
