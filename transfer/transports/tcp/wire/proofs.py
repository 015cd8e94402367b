"""Proofs: MACs that only who knows a ticket's secret can make, each for one place of one
connection. Pure.

A proof is keyed BLAKE2b (RFC 7693) under the secret, over who makes it, the greeting of the
connection with the nonces of both ends in it, type and id of the message, for an answer the proof
of the request that it answers, and the rest of the message's body: its length, and itself or, if it
is long, its SHA-256, for which processors have instructions. So one that was overheard fits
nothing else: no other connection, direction, type, request or content.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

PROOF_BYTES = 32
NONCE_BYTES = 16

_READER, _OWNER = 1, 2
_NO_REQUEST = bytes(PROOF_BYTES)
_LONG_BYTES = 4096
_MAX_KEY_BYTES = hashlib.blake2b.MAX_KEY_SIZE
# Who, the greeting, type and id of the message, the proof of the request, length of the content.
_PLACE = struct.Struct(f"<B32sBQ{PROOF_BYTES}sQ")
_LENGTH = struct.Struct("<Q")


class ConnectionProofs:
    """Makes the proofs of one connection; either end compares what it gets with its own.

    Args:
        hello: the body with which the reader greeted.
        welcome: what the owner answered, without its proof.
    """

    def __init__(self, hello: Buffer, welcome: Buffer) -> None:
        greeting = hashlib.sha256(_LENGTH.pack(len(hello)))
        greeting.update(hello)
        greeting.update(welcome)
        self._greeting = greeting.digest()

    def __repr__(self) -> str:
        return f"<ConnectionProofs {self._greeting.hex()[:8]}>"

    def of_request(self, secret: str, type_: int, request_id: int, content: Buffer = b"") -> bytes:
        """What a reader proves."""
        return self._proof(secret, _READER, type_, request_id, _NO_REQUEST, content)

    def of_answer(
        self,
        secret: str,
        type_: int,
        request_id: int,
        request_proof: bytes = _NO_REQUEST,
        content: Buffer = b"",
    ) -> bytes:
        """What an owner proves.

        Args:
            request_proof: of the request that is answered.
        """
        return self._proof(secret, _OWNER, type_, request_id, request_proof, content)

    def _proof(
        self,
        secret: str,
        who: int,
        type_: int,
        request_id: int,
        request_proof: bytes,
        content: Buffer,
    ) -> bytes:
        size = len(content)
        if size >= _LONG_BYTES:
            content = hashlib.sha256(content).digest()
        key = secret.encode("utf-8", "surrogatepass")
        if len(key) > _MAX_KEY_BYTES:
            key = hashlib.blake2b(key).digest()
        place = _PLACE.pack(who, self._greeting, type_, request_id, request_proof, size)
        # In one call, as every call counts on the way of a small read.
        return hashlib.blake2b(
            b"".join((place, content)), digest_size=PROOF_BYTES, key=key
        ).digest()


def same_proof(one: bytes, other: bytes) -> bool:
    """Whether they are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one, other)
