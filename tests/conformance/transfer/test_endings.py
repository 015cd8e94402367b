"""Release, renewal, forfeit, abort, cancellation and closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.network.stalling_proxy import StallingProxy
from tests.support.processes.waiting import SLOWNESS, wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Directory,
    Pair,
    engine_pair,
    fails,
    live_offers,
    make_engine,
    never_planned,
    succeeds,
    take_ended,
)
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.handoff import HandoffState, Offer
from transfer.engine.owning.owner import Owner
from transfer.errors import (
    ConfigurationError,
    DeadlineExceeded,
    FatalError,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    TransferCancelled,
)
from transfer.transports.tcp.transport import TcpTransport
from transfer.types import Claim, PeerId, PeerInfo, ReaderProcess, ReadPlan

STALL_AT_BYTES = 3 << 20


@pytest.fixture
def big_pair(case: TransferCase) -> Iterator[Pair]:
    """8 MiB in 64 KiB blocks, read in many slices."""
    with engine_pair(128, 65_536, settings=case.settings(slice_bytes=256 << 10)) as made:
        yield made


@pytest.fixture
def stalled(big_pair: Pair, case: TransferCase) -> Iterator[StallingProxy]:
    """Reads of ``big_pair`` stop after 3 MiB until it resumes."""
    with case.stalled(big_pair.owner.addresses[0], STALL_AT_BYTES) as stall:
        big_pair.directory.move(big_pair.owner_id, stall.address)
        yield stall


def half_way(handle: TransferHandle) -> None:
    assert wait_until(lambda: handle.bytes_moved > 1 << 20)
    is_in(handle, TransferState.READING)


def is_in(handle: TransferHandle, state: TransferState) -> None:
    assert handle.state is state


def test_both_ends_can_wait_for_the_end(pair: Pair) -> None:
    proof = pair.offer()
    assert not pair.owner.wait_for_end(0.01)
    assert not pair.reader.wait_for_end(0.01)
    handle = pair.read(proof)
    assert pair.reader.wait_for_end(10.0)
    assert pair.owner.wait_for_end(10.0)
    succeeds(handle)
    (ended,) = pair.owner.take_ended()
    assert ended.state is HandoffState.RELEASED
    assert not pair.owner.wait_for_end(0.01)
    assert not pair.reader.wait_for_end(0.01)


def test_a_reader_that_is_quicker_than_the_offer(pair: Pair) -> None:
    earlier = pair.offer()
    proof = replace(earlier, handoff_id="a" * 32, fence=earlier.fence + 1)
    other = replace(proof, handoff_id="b" * 32)
    handle = pair.read(proof)
    pair.reader.submit_release(pair.owner_id, other, used=False)
    succeeds(pair.read(earlier))
    assert not handle.wait(0.1)
    spans = pair.remote.spans(range(pair.remote.num_blocks))
    for late in (proof, other):
        pair.owner.offer(Offer(late.handoff_id, late.fence, late.secret, spans, 1, 30.0))
    succeeds(handle)
    assert pair.local_is_remote()
    assert wait_until(lambda: not live_offers(pair.owner))
    assert {one.handoff_id for one in pair.owner.take_ended()} == {
        earlier.handoff_id,
        proof.handoff_id,
        other.handoff_id,
    }


def test_n_readers(pair: Pair) -> None:
    proof = pair.offer(readers=3)
    for reader in ("a", "b"):
        succeeds(pair.read(replace(proof, reader=reader)))
        assert pair.owner.take_ended() == []
    fails(pair.read(replace(proof, reader="b")), HandoffRefused, "has released")
    succeeds(pair.read(replace(proof, reader="c")))
    assert [one.state for one in take_ended(pair.owner)] == [HandoffState.RELEASED]


def test_forfeits_count_as_releases(pair: Pair) -> None:
    proof = pair.offer(readers=2)
    pair.reader.submit_release(pair.owner_id, replace(proof, reader="a"), used=False)
    succeeds(pair.read(replace(proof, reader="b")))
    assert [one.state for one in take_ended(pair.owner)] == [HandoffState.RELEASED]


def test_renewal_keeps_an_offer_alive(pair: Pair) -> None:
    kept, left = pair.offer(ttl_s=1.0), pair.offer(ttl_s=1.0)
    unknown = replace(kept, handoff_id="0" * 32)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        pair.reader.submit_renew(pair.owner_id, [unknown, kept])
        time.sleep(0.05)
    (ended,) = take_ended(pair.owner)
    assert (ended.handoff_id, ended.state) == (left.handoff_id, HandoffState.EXPIRED)
    succeeds(pair.read(kept))


def test_an_offer_expires_without_anybody_asking(pair: Pair) -> None:
    pair.offer(ttl_s=0.05)
    assert wait_until(lambda: live_offers(pair.owner) == [])
    assert [one.state for one in pair.owner.take_ended()] == [HandoffState.EXPIRED]


def test_a_reader_aborts(pair: Pair) -> None:
    proof = pair.offer(readers=2)
    control = TcpTransport(pair.settings).open_control(
        pair.owner.addresses[0], ReaderProcess(PeerId("proxy", 0), "p-1"), proof, 2.0 * SLOWNESS
    )
    try:
        control.abort(proof, "client gone", 2.0 * SLOWNESS)
    finally:
        control.close()
    (ended,) = take_ended(pair.owner)
    assert (ended.state, ended.reason) == (HandoffState.ABORTED, "client gone")


def test_an_abort_between_reading_and_confirming_fails_the_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = pair.offer()
    advance = TransferHandle.advance

    def abort_first(handle: TransferHandle, state: TransferState) -> None:
        if state is TransferState.CONFIRMING:
            assert pair.owner.abort(proof.handoff_id, "preempted")
        advance(handle, state)

    monkeypatch.setattr(TransferHandle, "advance", abort_first)
    handle = pair.read(proof)
    fails(handle, HandoffRefused, "preempted")
    assert handle.error is not None
    assert handle.error.phase is Phase.CONFIRM
    assert handle.bytes_moved == pair.remote.bytes.nbytes


def test_an_abort_while_bytes_move_fails_the_read(big_pair: Pair, stalled: StallingProxy) -> None:
    proof = big_pair.offer()
    handle = big_pair.read(proof)
    half_way(handle)
    big_pair.owner.abort(proof.handoff_id, "preempted")
    stalled.resume()
    fails(handle, HandoffRefused, "preempted")
    assert [one.state for one in take_ended(big_pair.owner)] == [HandoffState.ABORTED]


def test_cancel_stops_the_bytes(big_pair: Pair, stalled: StallingProxy) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    handle.cancel()
    handle.cancel()
    assert handle.wait(2)
    assert handle.state is TransferState.CANCELLED
    assert isinstance(handle.error, TransferCancelled)
    moved = handle.bytes_moved
    big_pair.local.bytes.fill(0)  # what a caller may do now
    stalled.resume()
    time.sleep(0.1)
    assert not big_pair.local.bytes.any()
    assert handle.bytes_moved == moved < big_pair.remote.bytes.nbytes
    succeeds(big_pair.read(big_pair.offer()))
    assert big_pair.local_is_remote()


def test_cancelling_one_read_leaves_others_alone(big_pair: Pair, stalled: StallingProxy) -> None:
    half = range(64), range(64, 128)
    handles = [
        big_pair.read(
            big_pair.offer(), ReadPlan(big_pair.local.spans(ids), big_pair.remote.spans(ids))
        )
        for ids in half
    ]
    assert wait_until(lambda: any(handle.bytes_moved for handle in handles))
    handles[0].cancel()
    assert handles[0].wait(2)
    stalled.resume()
    succeeds(handles[1])
    for block in half[1]:
        assert big_pair.local.block(block) == big_pair.remote.block(block)


@pytest.mark.parametrize("times", [1, 30])
def test_cancel_at_any_time(big_pair: Pair, times: int) -> None:
    for number in range(times):
        handle = big_pair.read(big_pair.offer())
        time.sleep(number * 0.0003)
        handle.cancel()
        assert handle.wait(2)
        assert handle.state in (TransferState.CANCELLED, TransferState.DONE)
        if handle.state is TransferState.DONE:
            assert big_pair.local_is_remote()
        big_pair.local.bytes.fill(0)
        assert not big_pair.local.bytes.any()


def test_cancel_while_queued_is_at_once(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(max_reads_per_peer=1)) as pair:
        go_on = threading.Event()

        def slow(_: PeerInfo) -> ReadPlan:
            assert go_on.wait(5)
            return ReadPlan(pair.local.spans([0]), pair.remote.spans([0]))

        first, second = pair.read(pair.offer(), slow), pair.read(pair.offer(), never_planned)
        assert wait_until(lambda: first.state is TransferState.CONNECTING)
        second.cancel()
        assert second.state is TransferState.CANCELLED
        go_on.set()
        succeeds(first)


def test_cancel_while_planning_moves_nothing(pair: Pair) -> None:
    planning, go_on = threading.Event(), threading.Event()

    def slow(_: PeerInfo) -> ReadPlan:
        planning.set()
        assert go_on.wait(5)
        return ReadPlan(pair.local.spans([0]), pair.remote.spans([0]))

    handle = pair.read(pair.offer(), slow)
    assert planning.wait(5)
    handle.cancel()
    assert handle.state is TransferState.CANCELLED
    go_on.set()
    succeeds(pair.read(pair.offer(), ReadPlan(pair.local.spans([1]), pair.remote.spans([1]))))
    assert not any(pair.local.block(0))


def test_cancel_of_a_final_read_does_nothing(pair: Pair) -> None:
    handle = pair.read(pair.offer())
    succeeds(handle)
    handle.cancel()
    assert handle.state is TransferState.DONE


def test_a_deadline_half_way(big_pair: Pair, stalled: StallingProxy) -> None:
    begun = time.monotonic()
    handle = big_pair.read(big_pair.offer(), deadline_s=0.4)
    fails(handle, DeadlineExceeded, "0.4 s")
    assert time.monotonic() - begun < 1
    stalled.resume()


def test_a_broken_connection_is_tried_once_more(big_pair: Pair, stalled: StallingProxy) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    stalled.resume()
    stalled.cut()
    succeeds(handle)
    assert big_pair.local_is_remote()


def test_a_read_is_confirmed_again_if_the_first_answer_is_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    release = Owner.release

    with StallingProxy(pair.owner.addresses[0], limit_bytes=0) as proxy:

        def release_and_cut(self: Owner, claim: Claim, *, used: bool, read_id: str) -> None:
            release(self, claim, used=used, read_id=read_id)
            released.append(read_id)
            if len(released) == 1:
                proxy.cut()

        proxy.resume()
        monkeypatch.setattr(Owner, "release", release_and_cut)
        pair.directory.move(pair.owner_id, proxy.address)
        succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    assert released == [released[0]] * 2


def test_a_connection_that_broke_while_idle_is_replaced(
    big_pair: Pair, stalled: StallingProxy
) -> None:
    stalled.resume()
    for _ in range(3):
        big_pair.local.bytes.fill(0)
        succeeds(big_pair.read(big_pair.offer()))
        assert big_pair.local_is_remote()
        stalled.cut()


def test_a_connection_that_stays_broken_fails_the_read(
    big_pair: Pair, stalled: StallingProxy
) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    stalled.close()
    fails(handle, PeerUnreachable)


def test_a_peer_that_leaves_fails_its_reads_at_once(big_pair: Pair, stalled: StallingProxy) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    begun = time.monotonic()
    big_pair.directory.withdraw(big_pair.owner_id)
    fails(handle, PeerUnreachable, "left")
    assert time.monotonic() - begun < 1
    stalled.resume()


def test_a_reader_that_leaves_ends_what_it_read(big_pair: Pair, stalled: StallingProxy) -> None:
    handle = big_pair.read(big_pair.offer(readers=2))
    half_way(handle)
    big_pair.directory.withdraw(PeerId("reader", 0))
    (ended,) = take_ended(big_pair.owner)
    assert ended.state is HandoffState.ABORTED
    assert "died" in ended.reason
    stalled.resume()
    fails(handle, HandoffRefused, "died")


def test_closing_the_reader_half_way(big_pair: Pair, stalled: StallingProxy) -> None:
    handles = [big_pair.read(big_pair.offer()) for _ in range(6)]
    assert wait_until(lambda: any(handle.bytes_moved for handle in handles))
    begun = time.monotonic()
    big_pair.reader.close()
    assert time.monotonic() - begun < 3
    for handle in handles:
        fails(handle, TransferCancelled, "closed")
    big_pair.local.bytes.fill(0)
    stalled.resume()
    time.sleep(0.1)
    assert not big_pair.local.bytes.any()
    with pytest.raises(TransferCancelled):
        big_pair.read(big_pair.offer())


def test_closing_the_owner_half_way(big_pair: Pair, stalled: StallingProxy) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    begun = time.monotonic()
    big_pair.owner.close()
    assert time.monotonic() - begun < 3
    fails(handle, PeerUnreachable)
    assert [one.state for one in big_pair.owner.take_ended()] == [HandoffState.ABORTED]
    with pytest.raises(TransferCancelled):
        big_pair.offer()


def test_closing_delivers_what_was_to_be_told(pair: Pair) -> None:
    succeeds(pair.read(pair.offer()))
    take_ended(pair.owner)
    proofs = [pair.offer() for _ in range(20)]
    for proof in proofs:
        pair.reader.submit_release(pair.owner_id, proof, used=False)
    pair.reader.close()
    assert {one.handoff_id for one in pair.owner.take_ended()} == {
        proof.handoff_id for proof in proofs
    }


def test_life_of_an_engine(pair: Pair) -> None:
    engine = pair.engine("third")
    assert "new not listening" in repr(engine)
    with pytest.raises(TransferCancelled, match="new"):
        engine.submit_renew(pair.owner_id, [pair.offer()])
    with engine:
        assert engine.healthy
        assert engine.addresses[0] in repr(engine)
        with pytest.raises(ConfigurationError, match="before"):
            engine.start()
    engine.close()
    assert "closed" in repr(engine)
    assert [engine.healthy] == [False]
    with pytest.raises(TransferCancelled, match="closed"):
        engine.start()


def test_an_engine_that_never_started_closes(case: TransferCase) -> None:
    engine = make_engine(Directory(), "idle", settings=case.settings())
    engine.close()
    engine.close()


def test_a_port_that_is_taken(pair: Pair, case: TransferCase) -> None:
    port = int(pair.owner.addresses[0].rpartition(":")[2])
    engine = pair.engine("late", settings=case.settings(port=port))
    with pytest.raises(ConfigurationError, match=str(port)):
        engine.start()
    engine.close()


def test_an_owner_that_starts_anew_is_found_again(pair: Pair) -> None:
    old = pair.offer()
    succeeds(pair.read(pair.offer()))
    pair.owner.close()
    anew = pair.engine("owner", incarnation="owner-2")
    anew.register(pair.remote.address, pair.remote.bytes.nbytes)
    with anew:
        fails(pair.read(old), HandoffRefused, "owner-2")
        second = replace(pair, owner=anew)
        pair.local.bytes.fill(0)
        succeeds(second.read(replace(second.offer(), incarnation="owner-2")))
        fails(pair.read(old), HandoffRefused, "owner-2")
        assert pair.local_is_remote()


def test_reads_from_a_start_that_is_over_fail_when_the_next_one_shows(
    big_pair: Pair, stalled: StallingProxy
) -> None:
    handle = big_pair.read(big_pair.offer())
    half_way(handle)
    record = big_pair.directory.lookup(big_pair.owner_id)
    assert record is not None
    big_pair.directory.publish(replace(record, incarnation="owner-2"))
    fails(handle, PeerUnreachable, "anew")
    stalled.resume()


def test_errors_name_peer_and_handoff(pair: Pair) -> None:
    def planner(_: PeerInfo) -> ReadPlan:
        raise FatalError("no", phase=Phase.READ)

    proof = pair.offer()
    handle = pair.read(proof, planner)
    fails(handle, FatalError, f"owner/0.*{proof.handoff_id}")
    assert proof.handoff_id in repr(handle)


def test_the_budget_makes_reads_wait_and_cancel_wakes_them(
    case: TransferCase, big_pair: Pair, stalled: StallingProxy
) -> None:
    tight = big_pair.engine(
        "tight", settings=case.settings(max_inflight_bytes=4096, slice_bytes=256 << 10)
    )
    with tight:
        other = replace(big_pair, reader=tight)
        tight.register(big_pair.local.address, big_pair.local.bytes.nbytes)
        first, second = other.read(other.offer()), other.read(other.offer())
        assert wait_until(lambda: first.bytes_moved + second.bytes_moved > 1 << 20)
        waiting = second if first.bytes_moved else first
        running = first if first.bytes_moved else second
        is_in(waiting, TransferState.CONNECTING)
        waiting.cancel()
        is_in(waiting, TransferState.CANCELLED)
        stalled.resume()
        succeeds(running)
