"""Whatever connects to an owner: it goes on serving others and gives away nothing."""

from __future__ import annotations

import contextlib
import logging
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.network import raw_connections
from tests.support.network.false_owner import FalseOwner
from tests.support.network.raw_connections import RawReader, until_closed
from tests.support.processes.waiting import wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Pair,
    engine_pair,
    fails,
    live_offers,
    succeeds,
    take_ended,
)
from transfer.errors import PeerUnreachable, ProtocolError, TransferError
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import PROOF_BYTES
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials


@pytest.fixture
def case() -> TransferCase:
    """Only TCP: these tests send and receive the bytes of its protocol."""
    return TransferCase("tcp", {"transports": ["tcp"]})


def connect(pair: Pair) -> socket.socket:
    return raw_connections.connect(pair.owner.addresses[0])


def greeting(proof: Credentials) -> bytes:
    """A reader's first message."""
    return wire.message(MessageType.HELLO, 0, raw_connections.hello(proof))


def connections(pair: Pair) -> str:
    """What the owner says of its connections."""
    return repr(pair.owner._listeners[0])


def test_garbage_is_cut_off_and_logged_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "transfer"), connect(pair) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: owner\r\n\r\n")
        until_closed(sock)
    assert len([record for record in caplog.records if "GET" in record.getMessage()]) == 1
    succeeds(pair.read(pair.offer()))


def test_random_bytes_never_stop_the_listener(pair: Pair) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.binary(max_size=300), st.booleans(), st.sampled_from(MessageType))
    def check(data: bytes, greet: bool, type_: MessageType) -> None:
        with contextlib.ExitStack() as opened:
            if greet:
                sock = opened.enter_context(RawReader(pair.owner.addresses[0], proof)).sock
                data = wire.encode_header(type_, 1, len(data) + 9) + data
            else:
                sock = opened.enter_context(connect(pair))
            with contextlib.suppress(OSError):  # cut off before all was sent
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            until_closed(sock)

    proof = pair.offer()
    check()
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()


def test_reads_before_the_handshake_get_nothing(pair: Pair) -> None:
    proof = pair.offer()
    body = bytes(PROOF_BYTES) + wire.encode_read(proof.claim, pair.remote.spans([0]))
    with connect(pair) as sock:
        sock.sendall(wire.message(MessageType.READ, 1, body))
        assert until_closed(sock) == b""


def test_a_request_for_more_than_a_slice_may_have(pair: Pair) -> None:
    proof = pair.offer()
    rows = pair.remote.spans([0] * 64)
    rows[:, 1] = pair.remote.bytes.nbytes
    rows = rows.repeat(4000, axis=0)
    with RawReader(pair.owner.addresses[0], proof) as reader:
        reader.ask(MessageType.READ, 7, wire.encode_read(proof.claim, rows))
        answer = reader.receive()
        assert answer is not None
        assert answer.header.type is MessageType.ERROR
        assert reader.receive() is None
    assert wait_until(lambda: live_offers(pair.owner)[0].state == "reading")


def test_a_slow_stranger_is_cut_off(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(stall_timeout_s=0.2)) as pair:
        hello = greeting(pair.offer())
        for data in (b"", b"BA", hello[:-1], hello, hello + hello[:5]):
            with connect(pair) as sock:
                sock.sendall(data)
                until_closed(sock)
        succeeds(pair.read(pair.offer()))


def stuck_reader(pair: Pair) -> tuple[RawReader, Credentials]:
    """A connection that asks for 16 MiB and takes in none of it."""
    proof = pair.offer()
    rows = pair.remote.spans([0] * 4)
    rows[:, 1] = pair.remote.bytes.nbytes
    reader = RawReader(pair.owner.addresses[0], proof)
    reader.ask(MessageType.READ, 1, wire.encode_read(proof.claim, rows))
    assert wait_until(lambda: live_offers(pair.owner)[0].state == "reading")
    time.sleep(0.05)
    return reader, proof


def test_a_reader_that_takes_nothing_in_cannot_delay_the_end(case: TransferCase) -> None:
    with engine_pair(64, 65_536, settings=case.settings()) as pair:
        reader, proof = stuck_reader(pair)
        with reader:
            pair.owner.abort(proof.handoff_id, "given up")
            assert take_ended(pair.owner, 2.0)


def test_a_reader_that_takes_nothing_in_is_cut_off(case: TransferCase) -> None:
    with engine_pair(64, 65_536, settings=case.settings(stall_timeout_s=0.2)) as pair:
        reader, _ = stuck_reader(pair)
        with reader:
            assert wait_until(lambda: "0 connections" in connections(pair))


def test_connections_are_bounded(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(max_connections=2)) as pair:
        with contextlib.ExitStack() as opened:
            for _ in range(2):
                opened.enter_context(RawReader(pair.owner.addresses[0], pair.offer()))
            assert wait_until(lambda: "2 connections" in connections(pair))
            fails(pair.read(pair.offer()), PeerUnreachable, "2 connections")
        assert wait_until(lambda: "0 connections" in connections(pair))
        succeeds(pair.read(pair.offer()))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", PeerUnreachable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 2, ProtocolError),
        (wire.message(MessageType.OK, 0), ProtocolError),
        (wire.message(MessageType.WELCOME, 3), ProtocolError),
        (wire.message(MessageType.WELCOME, 0, b"\xff\xff"), ProtocolError),
        (wire.encode_header(MessageType.WELCOME, 0, 100) + b"cut", PeerUnreachable),
        (wire.encode_header(MessageType.WELCOME, 0, 1 << 40), ProtocolError),
    ],
    ids=["nothing", "http", "ok", "other request", "malformed", "cut short", "huge"],
)
def test_owners_that_do_not_speak_the_protocol(
    pair: Pair, answer: bytes, kind: type[TransferError]
) -> None:
    with FalseOwner(answer) as false:
        pair.directory.move(pair.owner_id, false.address)
        fails(pair.read(pair.offer()), kind)


def test_addresses_that_cannot_be_used(pair: Pair) -> None:
    pair.directory.move(pair.owner_id, "quantum://x", "shm://y:1")
    fails(pair.read(pair.offer()), PeerUnreachable, "quantum")
    pair.directory.move(pair.owner_id, "tcp://nowhere")
    fails(pair.read(pair.offer()), ProtocolError, "nowhere")
    pair.directory.move(pair.owner_id, "tcp://127.0.0.1:1")
    fails(pair.read(pair.offer()), PeerUnreachable, "refused")
