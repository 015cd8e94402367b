"""Whatever connects to an owner: it goes on serving others and gives away nothing."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.false_owner import FalseOwner
from tests.support.transfer_cases import TransferCase
from tests.support.transfer_engines import (
    Pair,
    engine_pair,
    fails,
    succeeds,
    take_ended,
    wait_until,
)
from transfer.addressing import parse_address
from transfer.errors import PeerUnreachable, ProtocolError, TransferError
from transfer.transports import tcp_wire as wire
from transfer.transports.base import Caller
from transfer.transports.tcp_wire import MessageType
from transfer.types import Credentials, PeerId

HELLO = wire.message(MessageType.HELLO, 0, wire.encode_hello(Caller(PeerId("stranger", 0), "s-1")))


@pytest.fixture
def case() -> TransferCase:
    """Only TCP: these tests send and receive the bytes of its protocol."""
    return TransferCase("tcp", {"transports": ["tcp"]})


def connect(pair: Pair) -> socket.socket:
    address = parse_address(pair.owner.addresses[0])
    return socket.create_connection((address.host, address.port), timeout=5)


def until_closed(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(65_536):
            received += data
    except ConnectionResetError:
        pass  # closed with our bytes unread
    return received


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
        with connect(pair) as sock:
            if greet:
                data = HELLO + wire.encode_header(type_, 1, len(data) + 9) + data
            with contextlib.suppress(OSError):  # cut off before all was sent
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            until_closed(sock)

    check()
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()


def test_reads_before_the_handshake_get_nothing(pair: Pair) -> None:
    proof = pair.offer()
    body = wire.encode_credentials(proof) + pair.remote.spans([0]).tobytes()
    with connect(pair) as sock:
        sock.sendall(wire.message(MessageType.READ, 1, body))
        assert until_closed(sock) == b""


def test_a_request_for_more_than_a_slice_may_have(pair: Pair) -> None:
    proof = pair.offer()
    rows = pair.remote.spans([0] * 64)
    rows[:, 1] = pair.remote.bytes.nbytes
    rows = rows.repeat(4000, axis=0)
    with connect(pair) as sock:
        sock.sendall(HELLO)
        body = wire.encode_credentials(proof) + rows.tobytes()
        threading.Thread(
            target=sock.sendall, args=(wire.message(MessageType.READ, 7, body),)
        ).start()
        answer = until_closed(sock)
    header_at = answer.rindex(wire.MAGIC)
    header = wire.decode_header(answer[header_at : header_at + wire.HEADER.size])
    assert header.type is MessageType.ERROR
    assert wait_until(lambda: pair.owner.offers()[0].state == "reading")


def test_a_slow_stranger_is_cut_off(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(stall_timeout_s=0.2)) as pair:
        for data in (b"", b"BA", HELLO[:-1], HELLO + HELLO[:5]):
            with connect(pair) as sock:
                sock.sendall(data)
                until_closed(sock)
        succeeds(pair.read(pair.offer()))


def stuck_reader(pair: Pair) -> tuple[socket.socket, Credentials]:
    """A connection that asks for 16 MiB and takes in none of it."""
    proof = pair.offer()
    rows = pair.remote.spans([0] * 4)
    rows[:, 1] = pair.remote.bytes.nbytes
    sock = connect(pair)
    body = wire.encode_credentials(proof) + rows.tobytes()
    sock.sendall(HELLO + wire.message(MessageType.READ, 1, body))
    assert wait_until(lambda: pair.owner.offers()[0].state == "reading")
    time.sleep(0.05)
    return sock, proof


def test_a_reader_that_takes_nothing_in_cannot_delay_the_end(case: TransferCase) -> None:
    with engine_pair(64, 65_536, settings=case.settings()) as pair:
        sock, proof = stuck_reader(pair)
        with sock:
            pair.owner.abort(proof.handoff_id, "given up")
            assert take_ended(pair.owner, 2.0)


def test_a_reader_that_takes_nothing_in_is_cut_off(case: TransferCase) -> None:
    with engine_pair(64, 65_536, settings=case.settings(stall_timeout_s=0.2)) as pair:
        sock, _ = stuck_reader(pair)
        with sock:
            assert wait_until(lambda: "0 connections" in repr(pair.owner._listeners[0]))


def test_connections_are_bounded(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(max_connections=2)) as pair:
        strangers = [connect(pair) for _ in range(2)]
        try:
            for stranger in strangers:
                stranger.sendall(HELLO)
                assert stranger.recv(10)
            fails(pair.read(pair.offer()), PeerUnreachable, "2 connections")
        finally:
            for stranger in strangers:
                stranger.close()
        assert wait_until(lambda: "0 connections" in repr(pair.owner._listeners[0]))
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
