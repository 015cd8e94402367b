"""Peers that have proved nothing keep nobody out, and cost an owner little."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.network import raw_connections
from tests.support.network.raw_connections import RawReader, receive, until_closed
from tests.support.network.strangers import strangers
from tests.support.processes.waiting import wait_until
from tests.support.servers.certificates import TlsFiles
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import Buffer, Pair, engine_pair, live_offers, succeeds
from transfer.transports.interrupt import Interrupt
from transfer.transports.tcp.places import MAX_STRANGERS
from transfer.transports.tcp.transport import TcpTransport
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import ReadPlan

READS = 10
PLAIN = TransferCase("tcp", {"transports": ["tcp"]})


@pytest.fixture(params=["tcp", "tcp+tls"])
def case(request: pytest.FixtureRequest, tls: TlsFiles) -> TransferCase:
    """The port that strangers come to."""
    files = tls.settings() if request.param == "tcp+tls" else {}
    return TransferCase(request.param, {"transports": ["tcp"], **files})


def readers_that_come_anew_succeed(pair: Pair) -> None:
    for number in range(READS):
        local = Buffer(pair.remote.num_blocks, fill=0)
        reader = pair.engine(f"reader-{number}")
        reader.register(local.address, local.bytes.nbytes)
        with reader:
            new = pair.with_reader(reader, local)
            succeeds(new.read(pair.offer()))
            assert new.local_is_remote()


@pytest.mark.parametrize("count", [24, MAX_STRANGERS + 8])
def test_those_who_say_nothing_keep_nobody_out(case: TransferCase, count: int) -> None:
    """Though the proven have no place to spare."""
    with (
        engine_pair(settings=case.settings(max_connections=3)) as pair,
        strangers(pair.owner.addresses[0], count),
    ):
        assert wait_until(lambda: _strangers(pair) >= min(count, MAX_STRANGERS))
        readers_that_come_anew_succeed(pair)


def test_those_who_greet_and_say_no_more_keep_nobody_out() -> None:
    with engine_pair(settings=PLAIN.settings(max_connections=3)) as pair:
        hello = wire.message(MessageType.HELLO, 0, raw_connections.hello(pair.offer()))
        with strangers(pair.owner.addresses[0], 24, hello):
            assert wait_until(lambda: _strangers(pair) >= 24)
            readers_that_come_anew_succeed(pair)


def test_a_reader_is_no_stranger_while_its_bytes_come_slowly(
    case: TransferCase, caplog: pytest.LogCaptureFixture
) -> None:
    """Its control connection has nothing to ask meanwhile."""
    caplog.set_level(logging.INFO, "transfer")
    settings = case.settings(connect_timeout_s=0.3)
    with (
        engine_pair(128, 1 << 16, settings=settings) as pair,
        case.stalled(pair.owner.addresses[0], 3 << 20) as stall,
    ):
        pair.directory.move(pair.owner_id, stall.address)
        handle = pair.read(pair.offer())
        assert wait_until(lambda: stall.holds_back)
        time.sleep(0.8)
        stall.resume()
        succeeds(handle)
        assert pair.local_is_remote()
    assert "once more" not in caplog.text


def test_a_connection_that_nothing_was_asked_on_is_no_stranger_s(case: TransferCase) -> None:
    settings = case.settings(connect_timeout_s=0.3)
    with engine_pair(settings=settings) as pair:
        transport, proof = TcpTransport(settings), pair.offer()
        address = pair.owner.addresses[0]
        control = transport.open_control(address, raw_connections.STRANGER, proof, 5.0)
        data = transport.open_data(address, raw_connections.STRANGER, control)
        local = Buffer(64, fill=0)
        plan = ReadPlan(local.spans(range(64)), pair.remote.spans(range(64)))
        data.open_read(proof, plan, 5.0).close()
        time.sleep(0.8)
        with data.open_read(proof, plan, 5.0) as session:
            session.run(Interrupt())
        assert np.array_equal(local.bytes, pair.remote.bytes)
        control.release(proof, used=True, read_id="", timeout_s=5.0)
        data.close()
        control.close()


def test_strangers_have_little_time(case: TransferCase) -> None:
    with (
        engine_pair(settings=case.settings(connect_timeout_s=0.3)) as pair,
        raw_connections.connect(pair.owner.addresses[0]) as sock,
    ):
        begun = time.monotonic()
        assert until_closed(sock) == b""
        assert 0.2 < time.monotonic() - begun < 3


@pytest.fixture
def plain() -> Iterator[Pair]:
    with engine_pair(settings=PLAIN.settings()) as made:
        yield made


@pytest.mark.parametrize("type_", [MessageType.READ, MessageType.BEGIN, MessageType.ATTACH])
@pytest.mark.parametrize("greeted", [False, True])
def test_what_a_stranger_asks_for_is_not_even_taken_in(
    plain: Pair, type_: MessageType, greeted: bool
) -> None:
    proof = plain.offer()
    with raw_connections.connect(plain.owner.addresses[0]) as sock:
        if greeted:
            sock.sendall(wire.message(MessageType.HELLO, 0, raw_connections.hello(proof)))
            assert receive(sock) is not None
        sock.sendall(wire.encode_header(type_, 1, 1 << 20))
        begun = time.monotonic()
        assert until_closed(sock) == b""
        # It waited for nothing that was announced.
        assert time.monotonic() - begun < plain.settings.connect_timeout_s / 2
    assert {offer.state for offer in live_offers(plain.owner)} == {"offered"}


def test_nobody_greets_with_a_hand_off_that_does_not_exist(plain: Pair) -> None:
    unknown = plain.offer()
    plain.owner.abort(unknown.handoff_id, "over")
    gone = type(unknown)("f" * 32, unknown.incarnation, unknown.fence, unknown.secret, "r")
    with raw_connections.connect(plain.owner.addresses[0]) as sock:
        sock.sendall(wire.message(MessageType.HELLO, 0, raw_connections.hello(gone)))
        answer = receive(sock)
        assert answer is not None
        assert answer.header.type is MessageType.ERROR
        assert until_closed(sock) == b""


def test_a_proven_peer_stays_while_strangers_come_and_go(plain: Pair) -> None:
    proof = plain.offer()
    address = plain.owner.addresses[0]
    with RawReader(address, proof) as proven, contextlib.ExitStack() as others:
        for _ in range(2 * MAX_STRANGERS):
            others.enter_context(raw_connections.connect(address))
        proven.ask(MessageType.READ, 1, wire.encode_read(proof.claim, plain.remote.spans([3])))
        answer = proven.receive()
        assert answer is not None
        assert answer.body.endswith(plain.remote.block(3))


def _strangers(pair: Pair) -> int:
    listener = pair.owner._listeners[0]
    return len(listener._places._strangers)  # type: ignore[attr-defined]
