"""Small reads: one round trip on the control connection, whatever the transport."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.false_owner import FalseOwner
from tests.support.stalling_proxy import StallingProxy
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
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.handoff import HandoffState
from transfer.engine.owner import Owner
from transfer.errors import (
    DeadlineExceeded,
    FatalError,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    ProtocolError,
    RegistrationError,
    TransferCancelled,
    TransportUnavailable,
)
from transfer.settings import MAX_FETCH_BYTES
from transfer.transports import tcp_wire as wire
from transfer.transports.base import MAX_FETCH_ROWS, Caller
from transfer.transports.tcp_wire import MessageType
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan, SpanArray

FETCH_BYTES = 16 << 10


@pytest.fixture
def pair(case: TransferCase) -> Iterator[Pair]:
    """Engines that fetch what has at most 16 KiB."""
    with engine_pair(settings=case.settings(fetch_bytes=FETCH_BYTES)) as made:
        yield made


def blocks(pair: Pair, *ids: int) -> ReadPlan:
    return ReadPlan(pair.local.spans(list(ids)), pair.remote.spans(list(ids)))


def rows(base: int, *spans: tuple[int, int]) -> SpanArray:
    return np.array([(base + at, size) for at, size in spans], dtype=np.uint64)


def test_bytes_are_equal_for_any_scatter_list(pair: Pair) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.randoms())
    def check(lengths: list[int], random: st.DataObject) -> None:
        gaps = [random.randrange(0, 50) for _ in lengths]  # type: ignore[attr-defined]
        local, at = [], 0
        for gap, length in zip(gaps, lengths, strict=True):
            local.append((at + gap, length))
            at += gap + length
        remote = [(random.randrange(0, 200_000), length) for length in lengths]  # type: ignore[attr-defined]
        expected = np.zeros_like(pair.local.bytes)
        for (to, length), (source, _) in zip(local, remote, strict=True):
            expected[to : to + length] = pair.remote.bytes[source : source + length]
        pair.local.bytes[:] = 0
        plan = ReadPlan(rows(pair.local.address, *local), rows(pair.remote.address, *remote))
        handle = pair.read(pair.offer(), plan)
        succeeds(handle)
        assert np.array_equal(pair.local.bytes, expected)
        assert handle.bytes_moved == sum(lengths)

    check()


@pytest.mark.parametrize("size", [FETCH_BYTES - 1, FETCH_BYTES, FETCH_BYTES + 1])
def test_around_the_limit(pair: Pair, size: int) -> None:
    plan = ReadPlan(rows(pair.local.address, (0, size)), rows(pair.remote.address, (7, size)))
    handle = pair.read(pair.offer(), plan)
    succeeds(handle)
    assert np.array_equal(pair.local.bytes[:size], pair.remote.bytes[7 : 7 + size])
    assert not pair.local.bytes[size:].any()
    (ended,) = take_ended(pair.owner)
    assert ended.state is HandoffState.RELEASED


def test_more_rows_than_a_fetch_takes_go_by_the_transport(pair: Pair) -> None:
    count = MAX_FETCH_ROWS + 1
    every_other = [(2 * at, 1) for at in range(count)]
    plan = ReadPlan(rows(pair.local.address, *every_other), rows(pair.remote.address, *every_other))
    succeeds(pair.read(pair.offer(), plan))
    assert np.array_equal(pair.local.bytes[: 2 * count : 2], pair.remote.bytes[: 2 * count : 2])


def test_each_reader_is_counted_off(pair: Pair) -> None:
    proof = pair.offer(readers=2)
    succeeds(pair.read(proof, blocks(pair, 3)))
    assert [offer.readers_left for offer in pair.owner.offers()] == [1]
    fails(pair.read(proof, blocks(pair, 3)), HandoffRefused, "has released it")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token": "0" * 32}, "wrong token"),
        ({"fence": 18}, "wrong fence"),
        ({"handoff_id": "f" * 32}, "unknown"),
    ],
)
def test_wrong_credentials_get_nothing(pair: Pair, change: dict[str, object], why: str) -> None:
    proof = pair.offer()
    wrong = type(proof)(**{**{n: getattr(proof, n) for n in proof.__slots__}, **change})
    fails(pair.read(wrong, blocks(pair, 0)), HandoffRefused, why)
    assert not pair.local.bytes.any()
    succeeds(pair.read(proof, blocks(pair, 0)))


def test_nothing_outside_of_the_grant(pair: Pair) -> None:
    proof = pair.offer(grant=pair.remote.spans([1, 2]))
    fails(pair.read(proof, blocks(pair, 2, 4)), HandoffRefused, "outside of what is offered")
    assert not pair.local.bytes.any()


def test_an_ended_hand_off_gives_nothing(pair: Pair) -> None:
    proof = pair.offer()
    assert pair.owner.abort(proof.handoff_id, "test")
    fails(pair.read(proof, blocks(pair, 0)), HandoffRefused, "aborted")
    assert not pair.local.bytes.any()


def test_the_calling_thread_can_read_by_itself(pair: Pair) -> None:
    threads = set(threading.enumerate())
    for count in (1, 64):
        plan = blocks(pair, *range(count))
        handle = pair.reader.read(pair.owner_id, pair.offer(), _planned(plan), 20.0)
        assert (handle.state, handle.error) == (TransferState.DONE, None)
    assert pair.local_is_remote()
    names = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not any(name.startswith("baton-reads") for name in names), names


def test_errors_of_a_read_on_the_calling_thread_are_in_the_handle(pair: Pair) -> None:
    plan = ReadPlan(rows(4096, (0, 8)), pair.remote.spans([0])[:, :] * 1)
    plan.remote[:, 1] = 8
    handle = pair.reader.read(pair.owner_id, pair.offer(), _planned(plan), 20.0)
    assert handle.state is TransferState.FAILED
    assert type(handle.error) is RegistrationError


def test_closing_waits_for_reads_of_other_threads(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(fetch_bytes=FETCH_BYTES)) as pair:
        entered, leave = threading.Event(), threading.Event()
        handles: list[TransferHandle] = []

        def planner(_: PeerInfo) -> ReadPlan:
            entered.set()
            assert leave.wait(20)
            return blocks(pair, 0)

        def read() -> None:
            handles.append(pair.reader.read(pair.owner_id, pair.offer(), planner, 20.0))

        reading = threading.Thread(target=read)
        reading.start()
        assert entered.wait(20)
        closing = threading.Thread(target=pair.reader.close)
        closing.start()
        closing.join(0.3)
        assert closing.is_alive()
        leave.set()
        closing.join(20)
        reading.join(20)
        assert not closing.is_alive()
        assert handles[0].state is TransferState.FAILED
        assert type(handles[0].error) is TransferCancelled
        assert not pair.local.bytes.any()
        with pytest.raises(TransferCancelled):
            pair.reader.read(pair.owner_id, pair.offer(), _planned(blocks(pair, 0)), 1.0)


def test_what_the_owner_cannot_copy_is_confirmed_twice_if_the_first_answer_is_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_copied(*_: object) -> bytes:
        raise TransportUnavailable("memory of a device", phase=Phase.READ)

    released: list[str] = []
    release = Owner.release

    with StallingProxy(pair.owner.addresses[0], limit_bytes=0) as proxy:

        def release_and_cut(self: Owner, proof: Credentials, *, used: bool, read_id: str) -> None:
            release(self, proof, used=used, read_id=read_id)
            released.append(read_id)
            if len(released) == 1:
                proxy.cut()

        proxy.resume()
        monkeypatch.setattr(Owner, "_copied", not_copied)
        monkeypatch.setattr(Owner, "release", release_and_cut)
        pair.directory.move(pair.owner_id, proxy.address)
        handle = pair.read(pair.offer(), blocks(pair, 3))
        succeeds(handle)
    assert pair.local.block(3) == pair.remote.block(3)
    assert handle.bytes_moved == 4096
    assert released == [released[0]] * 2


def _planned(plan: ReadPlan) -> Callable[[PeerInfo], ReadPlan]:
    return lambda _: plan


# What follows speaks the protocol itself.


@pytest.fixture
def plain() -> Iterator[Pair]:
    """As ``pair``, over TCP."""
    case = TransferCase("tcp", {"transports": ["tcp"]})
    with engine_pair(settings=case.settings(fetch_bytes=FETCH_BYTES)) as made:
        yield made


def test_a_fetch_that_is_stopped_is_over_at_once_and_writes_nothing(plain: Pair) -> None:
    info = PeerInfo(plain.owner_id, "owner-1", "same", b"layout", plain.owner.addresses)
    welcome = wire.message(MessageType.WELCOME, 0, wire.encode_welcome(info))
    with StallingProxy(plain.owner.addresses[0], limit_bytes=len(welcome) + 2000) as proxy:
        plain.directory.move(plain.owner_id, proxy.address)
        handle = plain.read(plain.offer(), blocks(plain, 2))
        assert wait_until(lambda: handle.state is TransferState.CONFIRMING)
        handle.cancel()
        assert handle.state is TransferState.CANCELLED
        proxy.resume()
        # Its connection is whole and serves the next one.
        succeeds(plain.read(plain.offer(), blocks(plain, 1)))
    assert not plain.local.bytes[2 * 4096 : 3 * 4096].any()
    assert handle.bytes_moved == 0


@pytest.mark.parametrize("count", [1, 64], ids=["fetched", "by the transport"])
def test_a_read_on_the_calling_thread_ends_at_its_deadline(plain: Pair, count: int) -> None:
    info = PeerInfo(plain.owner_id, "owner-1", "same", b"layout", plain.owner.addresses)
    welcome = wire.message(MessageType.WELCOME, 0, wire.encode_welcome(info))
    # Control and, for the second, two data streams are greeted; then nothing much comes.
    with StallingProxy(plain.owner.addresses[0], limit_bytes=3 * len(welcome) + 50) as proxy:
        plain.directory.move(plain.owner_id, proxy.address)
        started = time.monotonic()
        plan = _planned(blocks(plain, *range(count)))
        proof = plain.offer(readers=2)
        handle = plain.reader.read(plain.owner_id, proof, plan, 0.3)
        assert 0.3 <= time.monotonic() - started < 5.0
        assert handle.state is TransferState.FAILED
        assert type(handle.error) is DeadlineExceeded
        assert handle.bytes_moved < count * 4096


def test_the_owner_bounds_what_is_fetched(plain: Pair) -> None:
    proof = plain.offer()
    spans = plain.remote.spans([0] * (MAX_FETCH_BYTES // 4096 + 1))
    caller = Caller(PeerId("stranger", 0), "s-1")
    address = parse_address(plain.owner.addresses[0])
    with socket.create_connection((address.host, address.port), timeout=5) as sock:
        sock.sendall(wire.message(MessageType.HELLO, 0, wire.encode_hello(caller)))
        sock.sendall(wire.message(MessageType.FETCH, 1, wire.encode_read(proof, spans)))
        answer = b""
        while data := sock.recv(65_536):
            answer += data
    at = answer.rindex(wire.MAGIC)
    assert wire.decode_header(answer[at : at + wire.HEADER.size]).type is MessageType.ERROR
    assert b"at most" in answer
    succeeds(plain.read(proof, blocks(plain, 0)))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (wire.message(MessageType.FETCHED, 1, b"x" * 4095), FatalError),
        (wire.message(MessageType.FETCHED, 1, b"x" * 4097), FatalError),
        (wire.message(MessageType.FETCHED, 9, b"x" * 4096), ProtocolError),
        (wire.message(MessageType.OK, 1), ProtocolError),
        (b"", PeerUnreachable),
    ],
    ids=["short", "long", "other request", "no bytes", "cut"],
)
def test_an_owner_that_answers_otherwise(
    plain: Pair, answer: bytes, error: type[Exception]
) -> None:
    info = PeerInfo(plain.owner_id, "owner-1", "same", b"layout")
    welcome = wire.message(MessageType.WELCOME, 0, wire.encode_welcome(info))
    with FalseOwner(welcome, answer) as false:
        plain.directory.move(plain.owner_id, false.address)
        with plain.engine("second") as second:
            second.register(plain.local.address, plain.local.bytes.nbytes)
            reads = plain.with_reader(second, plain.local)
            handle = reads.read(plain.offer(), blocks(plain, 0))
            assert handle.wait(20)
    assert type(handle.error) is error, handle.error
    assert not plain.local.bytes.any()


def test_an_owner_that_answers_no_small_reads_is_read_by_the_transport(
    case: TransferCase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "transfer")
    with engine_pair(settings=case.settings(fetch_bytes=0)) as pair:
        eager = pair.engine("eager", settings=case.settings(fetch_bytes=FETCH_BYTES))
        eager.register(pair.local.address, pair.local.bytes.nbytes)
        with eager:
            succeeds(pair.with_reader(eager, pair.local).read(pair.offer(), blocks(pair, 3)))
            assert pair.local.block(3) == pair.remote.block(3)
    assert "refused FETCH of eager/0" in caplog.text
