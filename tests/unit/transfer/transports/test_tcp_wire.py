"""The TCP protocol's bytes: round trips, bounds, and any garbage gives a typed error."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transfer.errors import (
    DeadlineExceeded,
    HandoffNotReady,
    HandoffRefused,
    LayoutMismatch,
    PeerUnreachable,
    Phase,
    ProtocolError,
    RegistrationError,
    TlsRefused,
    TransferError,
    TransportUnavailable,
)
from transfer.spans import block_spans
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.fields import encode_claim
from transfer.transports.tcp.wire.proofs import NONCE_BYTES, PROOF_BYTES
from transfer.transports.tcp.wire.protocol import MessageType, Renewal
from transfer.types import Claim, PeerId, PeerInfo, ReaderProcess

TEXT = st.text(st.characters().filter(str.isprintable), max_size=40)
CLAIMS = st.builds(
    Claim,
    handoff_id=TEXT,
    incarnation=TEXT,
    fence=st.integers(0, (1 << 64) - 1),
    reader=TEXT,
    share=st.integers(1, (1 << 16) - 1),
)
CLAIM = Claim("h" * 32, "i" * 32, 5, "decode/0#1")
NONCE = bytes(range(NONCE_BYTES))
RENEWAL = Renewal(CLAIM, b"p" * PROOF_BYTES)

DECODERS: list[Callable[[bytes], object]] = [
    wire.decode_header,
    lambda body: wire.decode_hello(NONCE + body),
    lambda body: wire.decode_welcome(NONCE + body),
    wire.decode_read,
    wire.decode_begin,
    wire.decode_attach,
    wire.decode_release,
    wire.decode_abort,
    wire.decode_renew,
    lambda body: wire.decode_renewed(body, 3),
    lambda body: wire.decode_error(body, Phase.READ, "p"),
]


@pytest.mark.parametrize("type_", MessageType)
def test_header_round_trip(type_: MessageType) -> None:
    header = wire.decode_header(wire.encode_header(type_, 1 << 60, 0))
    assert header == wire.Header(type_, 1 << 60, 0)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes"),
        (wire.HEADER.pack(b"HTTP", 1, 1, 0, 0, 0), "HTTP"),
        (wire.HEADER.pack(wire.MAGIC, 1, 1, 0, 0, 0), "version 1"),
        (wire.HEADER.pack(wire.MAGIC, 3, 1, 0, 0, 0), "version 3"),
        (wire.HEADER.pack(wire.MAGIC, 2, 99, 0, 0, 0), "type 99"),
        (wire.HEADER.pack(wire.MAGIC, 2, 1, 1, 0, 0), "flags"),
        (wire.HEADER.pack(wire.MAGIC, 2, MessageType.HELLO, 0, 0, 4097), "4097"),
        (wire.HEADER.pack(wire.MAGIC, 2, MessageType.PROVE, 0, 0, 33), "33"),
        (wire.HEADER.pack(wire.MAGIC, 2, MessageType.RENEW, 0, 0, (1 << 20) + 1), "1048577"),
        (wire.HEADER.pack(wire.MAGIC, 2, MessageType.READ, 0, 0, 1 << 24), "16777216"),
        (wire.HEADER.pack(wire.MAGIC, 2, MessageType.DATA, 0, 0, (1 << 64) - 1), "DATA"),
    ],
)
def test_headers_that_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        wire.decode_header(data)


@given(TEXT, st.integers(0, (1 << 32) - 1), TEXT, CLAIMS)
def test_hello_round_trip(engine_id: str, rank: int, incarnation: str, claim: Claim) -> None:
    reader = ReaderProcess(PeerId(engine_id, rank), incarnation)
    assert wire.decode_hello(wire.encode_hello(reader, NONCE, claim)) == (reader, claim)


@given(TEXT, TEXT, st.binary(max_size=200), st.lists(TEXT, max_size=16).map(tuple))
def test_welcome_round_trip(
    engine_id: str, layout_hash: str, layout: bytes, addresses: tuple[str, ...]
) -> None:
    info = PeerInfo(PeerId(engine_id, 3), "i", layout_hash, layout, addresses)
    assert wire.decode_welcome(wire.encode_welcome(info, NONCE)) == info


@given(CLAIMS, st.booleans(), TEXT)
def test_release_and_abort_round_trip(claim: Claim, used: bool, reason: str) -> None:
    body = wire.encode_release(claim, used=used, read_id=reason)
    assert wire.decode_release(body) == (claim, reason, used)
    assert wire.claim_of(body) == claim
    assert wire.decode_abort(wire.encode_abort(claim, reason)) == (claim, reason)


@given(st.binary(max_size=100))
def test_proofs_are_split_off(content: bytes) -> None:
    proof, rest = wire.split_proof(RENEWAL.proof + content)
    assert (proof, bytes(rest)) == (RENEWAL.proof, content)


def test_a_body_without_a_proof_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no proof, which takes 32"):
        wire.split_proof(bytes(31))


@given(st.lists(st.builds(Renewal, CLAIMS, st.binary(min_size=32, max_size=32)), max_size=5))
def test_renew_round_trip(renewals: list[Renewal]) -> None:
    assert wire.decode_renew(wire.encode_renew(renewals)) == renewals


@given(CLAIMS, st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_read_round_trip(claim: Claim, block_ids: list[int]) -> None:
    spans = block_spans(1 << 40, 4096, 4096, block_ids)
    decoded, rows = wire.decode_read(wire.encode_read(claim, spans))
    assert decoded == claim
    assert rows.tolist() == spans.tolist()
    begun, *texts, rows = wire.decode_begin(wire.encode_begin(claim, "id", "rdma", spans))
    assert (begun, texts) == (claim, ["id", "rdma"])
    assert rows.tolist() == spans.tolist()


def test_a_share_of_nothing_is_refused() -> None:
    body = bytearray(encode_claim(CLAIM))
    body[8:10] = b"\0\0"
    with pytest.raises(ProtocolError, match="share of 0"):
        wire.decode_abort(bytes(body))


FORGED = "\n12:00:00 INFO all is well"


@pytest.mark.parametrize("field", ["handoff_id", "incarnation", "reader"])
@pytest.mark.parametrize("text", [FORGED, "\x1b[2J", "\u2028", "\u202e"])
def test_claims_that_would_not_stay_in_a_line_of_a_log_are_refused(field: str, text: str) -> None:
    wrong = replace(CLAIM, **{field: text})  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="not printable"):
        encode_claim(wrong)
    right = replace(CLAIM, **{field: "?" * len(text.encode())})  # type: ignore[arg-type]
    body = encode_claim(right).replace(b"?" * len(text.encode()), text.encode())
    for decode in (wire.claim_of, lambda body: wire.decode_hello(NONCE + bytes(8) + body)):
        with pytest.raises(ProtocolError, match="not printable") as caught:
            decode(body)
        assert caught.value.message.isprintable()


def test_names_that_would_not_stay_in_a_line_of_a_log_are_refused() -> None:
    hello = wire.encode_hello(ReaderProcess(PeerId("reader", 0), "i-1"), NONCE, CLAIM)
    for wrong in (hello.replace(b"reader", b"read\n."), hello.replace(b"i-1", b"i\x1b1")):
        with pytest.raises(ProtocolError, match="not printable"):
            wire.decode_hello(wrong)


def test_what_is_told_of_an_error_stays_in_a_line_of_a_log() -> None:
    told = wire.encode_error(HandoffRefused(f"no{FORGED}", phase=Phase.READ))
    message = wire.decode_error(told, Phase.READ, "p").message
    assert message == f"no?{FORGED[1:]}"
    assert wire.decode_abort(wire.encode_abort(CLAIM, FORGED)) == (CLAIM, f"?{FORGED[1:]}")
    with pytest.raises(ProtocolError, match="not printable"):
        wire.decode_error(told.replace(b"no?", b"no\n"), Phase.READ, "p")


def test_claims_of_more_or_less_texts_are_refused() -> None:
    body = encode_claim(CLAIM)
    for other in (body.replace(b"\0d", b"-d"), body.replace(b"hh", b"h\0", 1)):
        with pytest.raises(ProtocolError, match="texts, not 3"):
            wire.decode_abort(other + b"\0\0")


def test_attach_round_trip() -> None:
    assert wire.decode_attach(wire.encode_attach("rdma", b"\x00own")) == ("rdma", b"\x00own")


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (HandoffRefused, HandoffRefused),
        (HandoffNotReady, HandoffNotReady),
        (RegistrationError, HandoffRefused),
        (DeadlineExceeded, HandoffRefused),
        (ProtocolError, ProtocolError),
        (LayoutMismatch, LayoutMismatch),
        (PeerUnreachable, PeerUnreachable),
        (TlsRefused, TlsRefused),
        (TransportUnavailable, TransportUnavailable),
    ],
)
def test_errors_keep_their_kind(sent: type[TransferError], received: type[TransferError]) -> None:
    body = wire.encode_error(sent("why \ud800" + "x" * 9999, phase=Phase.CONNECT))
    error = wire.decode_error(body, Phase.CONFIRM, "p/0", "h")
    assert type(error) is received
    assert error.message.startswith("why ?xxx")
    assert (error.phase, error.peer, error.handoff_id) == (Phase.CONFIRM, "p/0", "h")


@pytest.mark.parametrize(
    "encode",
    [
        lambda: wire.encode_hello(ReaderProcess(PeerId("x" * 600, 0), "i"), NONCE, CLAIM),
        lambda: wire.encode_hello(ReaderProcess(PeerId("\ud800", 0), "i"), NONCE, CLAIM),
        lambda: encode_claim(Claim("h", "i", -1, "r")),
        lambda: encode_claim(Claim("h", "i", 1 << 64, "r")),
        lambda: encode_claim(replace(CLAIM, reader="r\0")),
        lambda: encode_claim(replace(CLAIM, reader="r" * 2048)),
        lambda: encode_claim(replace(CLAIM, share=0)),
        lambda: encode_claim(replace(CLAIM, share=1 << 16)),
        lambda: wire.encode_renew([RENEWAL] * 513),
        lambda: wire.encode_welcome(
            PeerInfo(PeerId("p", 0), "i", "h", bytes((1 << 20) + 1)), NONCE
        ),
        lambda: wire.encode_welcome(PeerInfo(PeerId("p", 0), "i", "h", b"", ("a",) * 17), NONCE),
    ],
)
def test_what_the_peer_would_refuse_is_not_sent(encode: Callable[[], bytes]) -> None:
    with pytest.raises(ProtocolError):
        encode()


@pytest.mark.parametrize("rows", [b"", b"x" * 15, b"x" * 17, bytes(16 * 262_145)])
def test_span_rows_are_bounded(rows: bytes) -> None:
    with pytest.raises(ProtocolError, match="rows"):
        wire.decode_read(encode_claim(CLAIM) + rows)


@pytest.mark.parametrize("decode", DECODERS)
def test_any_bytes_give_a_value_or_a_typed_error(decode: Callable[[bytes], object]) -> None:
    @given(st.binary(max_size=120))
    @example(b"\xff" * 64)
    @example(b"\x00" * 64)
    @example(encode_claim(CLAIM))
    @example(wire.encode_release(CLAIM, used=True, read_id="")[:-1] + b"\x02")
    @example(wire.encode_renew([RENEWAL]) + b"!")
    def check(data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            decode(data)

    check()


@given(st.data())
def test_valid_messages_cut_or_changed_give_a_typed_error(data: st.DataObject) -> None:
    valid = wire.encode_renew([RENEWAL, RENEWAL])
    at = data.draw(st.integers(0, len(valid) - 1))
    changed = bytearray(valid)
    changed[at] ^= data.draw(st.integers(1, 255))
    for body in (valid[:at], bytes(changed)):
        with contextlib.suppress(ProtocolError):
            wire.decode_renew(body)


def test_lies_about_lengths_cost_no_memory() -> None:
    bodies = [b"\xff\xff" + bytes(100), b"\x00\x02" + b"\xff" * 98]
    tracemalloc.start()
    try:
        for body in bodies:
            for decode in DECODERS:
                with pytest.raises(ProtocolError):
                    decode(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20
