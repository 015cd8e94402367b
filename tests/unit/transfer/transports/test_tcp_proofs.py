"""A proof fits one place of one connection, and nothing else."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from transfer.transports.tcp.wire.proofs import PROOF_BYTES, ConnectionProofs, same_proof
from transfer.transports.tcp.wire.protocol import MessageType

SECRET = "c" * 32
PROOFS = ConnectionProofs(b"hello", b"welcome")
OK, RELEASE = MessageType.OK, MessageType.RELEASE


def test_every_circumstance_makes_another_proof() -> None:
    one = PROOFS.of_request(SECRET, RELEASE, 1, b"content")
    proofs = [
        one,
        PROOFS.of_request("d" * 32, RELEASE, 1, b"content"),
        PROOFS.of_request(SECRET, MessageType.READ, 1, b"content"),
        PROOFS.of_request(SECRET, RELEASE, 2, b"content"),
        PROOFS.of_request(SECRET, RELEASE, 1, b"contenT"),
        PROOFS.of_answer(SECRET, RELEASE, 1, content=b"content"),
        PROOFS.of_answer(SECRET, RELEASE, 1, one, b"content"),
        # The same bytes of greeting, cut elsewhere; other nonces.
        ConnectionProofs(b"hell", b"owelcome").of_request(SECRET, RELEASE, 1, b"content"),
        ConnectionProofs(b"Hello", b"welcome").of_request(SECRET, RELEASE, 1, b"content"),
        ConnectionProofs(b"hello", b"Welcome").of_request(SECRET, RELEASE, 1, b"content"),
    ]
    assert len(set(proofs)) == len(proofs)
    assert {len(proof) for proof in proofs} == {PROOF_BYTES}


def test_the_proof_is_the_one_that_is_written_down() -> None:
    """In the words of its description, so that another implementation could be made from it."""
    greeting = hashlib.sha256((5).to_bytes(8, "little") + b"hello" + b"welcome").digest()
    place = b"\x02" + greeting + bytes([OK]) + (7).to_bytes(8, "little") + b"p" * PROOF_BYTES
    long = b"x" * 4096
    for content, hashed in ((b"content", b"content"), (long, hashlib.sha256(long).digest())):
        whole = place + len(content).to_bytes(8, "little") + hashed
        right = hashlib.blake2b(whole, digest_size=32, key=SECRET.encode()).digest()
        assert PROOFS.of_answer(SECRET, OK, 7, b"p" * PROOF_BYTES, content) == right


@given(st.text(st.characters(exclude_categories=[])), st.binary())
def test_any_text_is_a_secret_and_any_buffer_content(secret: str, content: bytes) -> None:
    proof = PROOFS.of_request(secret, RELEASE, 1, content)
    assert same_proof(proof, PROOFS.of_request(secret, RELEASE, 1, memoryview(content)))
    assert not same_proof(proof, PROOFS.of_request(secret + "x", RELEASE, 1, bytearray(content)))
    assert not same_proof(proof, proof[:-1])


def test_long_secrets_differ_to_their_end() -> None:
    one, other = (PROOFS.of_request("s" * 100 + end, RELEASE, 1) for end in "ab")
    assert one != other


def test_neither_secret_nor_proof_is_shown() -> None:
    assert SECRET not in repr(PROOFS)
