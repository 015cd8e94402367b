"""Bytes arrive as planned, or the read fails as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.processes.waiting import SLOWNESS
from tests.support.transfers.cases import TransferCase, why_no_process_memory
from tests.support.transfers.engines import (
    Buffer,
    Pair,
    engine_pair,
    fails,
    live_offers,
    never_planned,
    succeeds,
    take_ended,
)
from transfer.engine.handoff import HandoffState, Offer
from transfer.errors import (
    FatalError,
    HandoffRefused,
    LayoutMismatch,
    OwnerUnproven,
    PeerUnknown,
    Phase,
    RegistrationError,
    TransferError,
    TransportUnavailable,
)
from transfer.settings import TransferSettings
from transfer.spans import empty_spans, overlaps_itself
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan, SpanArray

BLOCKS = 64
MAX_LIST_BYTES = 64 << 20
MAX_LIST_ROWS = 100_000


def test_a_read_moves_every_byte_and_ends_the_handoff(pair: Pair) -> None:
    handle = pair.read(pair.offer())
    succeeds(handle)
    assert pair.local_is_remote()
    assert handle.bytes_moved == pair.remote.bytes.nbytes
    timings = handle.timings
    assert 0 < timings.read_s < timings.total_s
    (ended,) = take_ended(pair.owner)
    assert (ended.handoff_id, ended.state) == (handle.handoff_id, HandoffState.RELEASED)
    assert live_offers(pair.owner) == []


@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"streams_per_peer": 1, "slice_bytes": 4096},
        {"streams_per_peer": 4, "slice_bytes": 5000, "socket_buffer_bytes": 4096},
        {"socket_buffer_bytes": 1 << 20},
    ],
    ids=["default", "one stream", "tiny buffers", "big buffers"],
)
def test_scattered_lists(case: TransferCase, tuning: dict[str, int]) -> None:
    block_ids = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS)

    with engine_pair(BLOCKS, 12_345, settings=case.settings(**tuning)) as pair:

        @settings(max_examples=15, deadline=None)
        @given(block_ids, st.randoms(use_true_random=False), st.integers(1, 12_345))
        def check(remote_ids: list[int], random: object, length: int) -> None:
            local_ids = list(range(BLOCKS))
            random.shuffle(local_ids)  # type: ignore[attr-defined]
            local_ids = local_ids[: len(remote_ids)]
            pair.local.bytes.fill(0)
            local, remote = pair.local.spans(local_ids), pair.remote.spans(remote_ids)
            local[:, 1] = remote[:, 1] = length
            succeeds(pair.read(pair.offer(), ReadPlan(local, remote)))
            wanted = np.zeros_like(pair.local.bytes)
            for to, source in zip(local_ids, remote_ids, strict=True):
                block = pair.remote.block(source)[:length]
                wanted[to * 12_345 : to * 12_345 + length] = np.frombuffer(block, dtype=np.uint8)
            assert np.array_equal(pair.local.bytes, wanted)

        check()


@pytest.mark.parametrize(
    ("num_rows", "block_bytes"), [(1024, 65_536), (100_000, 4096)], ids=["64 MiB", "100000 rows"]
)
def test_big_reads(case: TransferCase, num_rows: int, block_bytes: int) -> None:
    with engine_pair(512, block_bytes, settings=case.settings()) as pair:
        local = Buffer(num_rows, block_bytes, fill=0)
        pair.reader.register(local.address, local.bytes.nbytes)
        random = np.random.default_rng(1)
        local_ids, remote_ids = random.permutation(num_rows), random.integers(0, 512, num_rows)
        plan = ReadPlan(local.spans(local_ids), pair.remote.spans(remote_ids))
        succeeds(pair.read(pair.offer(), plan))
        arrived = local.bytes.reshape(num_rows, block_bytes)
        sent = pair.remote.bytes.reshape(512, block_bytes)
        for rows in np.array_split(np.arange(num_rows), 64):
            assert np.array_equal(arrived[local_ids[rows]], sent[remote_ids[rows]])


def test_lists_of_any_sizes(case: TransferCase) -> None:
    """Rows of unequal lengths in any order, 1 byte to 64 MiB in all, next to bytes that must stay
    as they are."""
    area_bytes = 96 << 20
    remote, local = Buffer(1, area_bytes), Buffer(1, area_bytes, fill=0)
    sizes = st.one_of(
        st.integers(1, 100),
        st.integers(0, 26).flatmap(lambda power: st.integers(1 << power, (2 << power) - 1)),
    ).map(lambda size: min(size, MAX_LIST_BYTES))
    # In the emulated machine a hundred thousand rows take half a minute: once is enough there.
    counts = st.integers(1, MAX_LIST_ROWS if SLOWNESS == 1 else 5000)

    with engine_pair(settings=case.settings()) as pair:
        pair.owner.register(remote.address, area_bytes)
        pair.reader.register(local.address, area_bytes)

        @settings(max_examples=12, deadline=None)
        @given(sizes, counts, st.integers(0, 1 << 32))
        @example(1, 1, 0)
        @example(MAX_LIST_BYTES, 1, 1)
        @example(MAX_LIST_BYTES, 5000, 2)
        @example(MAX_LIST_BYTES, MAX_LIST_ROWS, 3)
        def check(size: int, num_rows: int, seed: int) -> None:
            plan = random_plan(local.address, remote.address, size, num_rows, seed)
            proof = pair.offer(grant=plan.remote)
            succeeds(pair.read(proof, plan))
            wanted = np.zeros(area_bytes, dtype=np.uint8)
            offsets = zip(
                (plan.local[:, 0] - np.uint64(local.address)).tolist(),
                (plan.remote[:, 0] - np.uint64(remote.address)).tolist(),
                plan.local[:, 1].tolist(),
                strict=True,
            )
            for to, source, length in offsets:
                wanted[to : to + length] = remote.bytes[source : source + length]
            assert np.array_equal(local.bytes, wanted)
            local.bytes.fill(0)

        check()


def random_plan(local_base: int, remote_base: int, size: int, num_rows: int, seed: int) -> ReadPlan:
    """``size`` bytes in at most ``num_rows`` rows, in another order and with other gaps on each
    side."""
    random = np.random.default_rng(seed)
    cuts = np.unique(random.integers(1, size, num_rows - 1)) if size > 1 else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate(([0], cuts, [size])))

    def side(base: int) -> SpanArray:
        order = random.permutation(lengths.size)
        gaps = random.integers(0, 2, lengths.size) * random.integers(0, 1000, lengths.size)
        starts = np.cumsum(lengths[order] + gaps) - lengths[order]
        spans = np.empty((lengths.size, 2), dtype=np.uint64)
        spans[order, 0] = starts + base
        spans[:, 1] = lengths
        return spans

    return ReadPlan(local=side(local_base), remote=side(remote_base))


def test_an_empty_plan_is_a_read(pair: Pair) -> None:
    succeeds(pair.read(pair.offer(), ReadPlan(pair.local.spans([]), pair.remote.spans([]))))
    assert take_ended(pair.owner)


def test_the_planner_sees_the_owner(pair: Pair) -> None:
    seen: list[PeerInfo] = []

    def planner(info: PeerInfo) -> ReadPlan:
        seen.append(info)
        return ReadPlan(pair.local.spans([0]), pair.remote.spans([5]))

    succeeds(pair.read(pair.offer(), planner))
    told = tuple(address for address in pair.owner.addresses if not address.startswith("tcp:"))
    assert seen == [PeerInfo(pair.owner_id, "owner-1", "same", b"layout", told)]
    assert pair.local.block(0) == pair.remote.block(5)


def test_a_big_layout_arrives(pair: Pair) -> None:
    layout = bytes(range(256)) * 4096
    seen: list[bytes] = []

    def planner(info: PeerInfo) -> ReadPlan:
        seen.append(info.layout)
        raise LayoutMismatch("not ours", phase=Phase.CONNECT)

    with pair.engine("wordy", layout=layout) as wordy:
        proof = Credentials("f" * 32, "wordy-1", 1, "secret", "r")
        wordy.offer(Offer(proof.handoff_id, 1, proof.secret, empty_spans(), 1, 30.0))
        handle = pair.reader.submit_read(PeerId("wordy", 0), proof, planner, 5)
        fails(handle, LayoutMismatch, "not ours")
    assert seen == [layout]


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, ZeroDivisionError])
def test_a_planner_that_fails_fails_the_read(pair: Pair, error: type[Exception]) -> None:
    def planner(_: PeerInfo) -> ReadPlan:
        raise error("boom")

    fails(pair.read(pair.offer(), planner), FatalError, "boom")
    succeeds(pair.read(pair.offer()))


def test_local_spans_that_overlap_are_refused(pair: Pair) -> None:
    plan = ReadPlan(pair.local.spans([0, 1, 0]), pair.remote.spans([0, 1, 2]))
    fails(pair.read(pair.offer(), plan), RegistrationError, "overlap")
    assert not pair.local.bytes.any()


@given(st.permutations(range(6)), st.integers(1, 4095), st.integers(0, 4))
def test_any_overlap_is_found(order: list[int], shared: int, at: int) -> None:
    local = Buffer(8, fill=0).spans(order)
    assert not overlaps_itself(local)
    rows = local[:, 0].argsort()
    local[rows[at], 1] += shared
    assert overlaps_itself(local)


def test_local_spans_must_be_registered(pair: Pair) -> None:
    foreign = Buffer(2, fill=0)
    plan = ReadPlan(foreign.spans([0]), pair.remote.spans([0]))
    fails(pair.read(pair.offer(), plan), RegistrationError, "registered")
    region = pair.reader.register(foreign.address, foreign.bytes.nbytes)
    succeeds(pair.read(pair.offer(), plan))
    region.close()
    region.close()
    assert "closed" in repr(region)
    fails(pair.read(pair.offer(), plan), RegistrationError, "registered")


def test_sides_of_a_plan_must_fit(pair: Pair) -> None:
    plan = ReadPlan(pair.local.spans([0, 2]), pair.remote.spans([0]))
    fails(pair.read(pair.offer(), plan), RegistrationError)


def test_only_registered_memory_can_be_offered(pair: Pair) -> None:
    with pytest.raises(RegistrationError):
        pair.offer(grant=Buffer(1).spans([0]))


def test_memory_unregistered_after_the_offer_is_not_read(pair: Pair) -> None:
    more = Buffer(4)
    region = pair.owner.register(more.address, more.bytes.nbytes)
    proof = pair.offer(grant=more.spans(range(4)))
    region.close()
    plan = ReadPlan(pair.local.spans([0]), more.spans([0]))
    fails(pair.read(proof, plan), HandoffRefused, "registered")


def test_memory_that_is_registered_again(pair: Pair) -> None:
    more, target = Buffer(4), Buffer(4, fill=0)
    plan = ReadPlan(target.spans(range(4)), more.spans(range(4)))
    for time in range(3):
        more.bytes.fill(time + 1)
        with (
            pair.owner.register(more.address, more.bytes.nbytes),
            pair.reader.register(target.address, target.bytes.nbytes),
        ):
            proof = pair.offer(grant=more.spans(range(4)))
            succeeds(pair.read(proof, plan))
            assert (target.bytes == time + 1).all()
        with pytest.raises(RegistrationError):
            pair.offer(grant=more.spans([0]))
        fails(pair.read(pair.offer(), plan), RegistrationError)


def test_memory_that_is_registered_twice_stays_until_both_are_closed(pair: Pair) -> None:
    more = Buffer(4)
    whole = pair.owner.register(more.address, more.bytes.nbytes)
    half = pair.owner.register(more.address, more.bytes.nbytes // 2)
    plan = ReadPlan(pair.local.spans([0, 1]), more.spans([0, 1]))
    proof = pair.offer(grant=more.spans(range(4)))
    whole.close()
    succeeds(pair.read(proof, plan))
    assert pair.local.block(1) == more.block(1)
    with pytest.raises(RegistrationError):
        pair.offer(grant=more.spans(range(4)))
    half.close()
    with pytest.raises(RegistrationError):
        pair.offer(grant=more.spans([0]))


def test_one_bad_span_fails_the_whole_read(pair: Pair) -> None:
    proof = pair.offer(grant=pair.remote.spans(range(10)))
    blocks = [*range(10), 11]
    plan = ReadPlan(pair.local.spans(blocks), pair.remote.spans(blocks))
    fails(pair.read(proof, plan), HandoffRefused, "outside")
    assert [one.offer.handoff_id for one in live_offers(pair.owner)] == [proof.handoff_id]
    assert pair.owner.take_ended() == []


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        # Which of the two ends does not know it neither can tell.
        ({"secret": "0" * 32}, OwnerUnproven, "has not proved"),
        ({"fence": 18}, HandoffRefused, "wrong fence"),
        ({"incarnation": "owner-0"}, HandoffRefused, "owner-0"),
        ({"handoff_id": "f" * 32}, HandoffRefused, "unknown"),
    ],
    ids=["secret", "fence", "incarnation", "handoff_id"],
)
def test_wrong_credentials_get_nothing(
    pair: Pair, wrong: dict[str, str | int], error: type[TransferError], why: str
) -> None:
    proof = pair.offer()
    fails(pair.read(replace(proof, **wrong)), error, why)  # type: ignore[arg-type]
    assert not pair.local.bytes.any()
    succeeds(pair.read(proof))


@pytest.mark.parametrize("end", ["released", "aborted", "expired"])
def test_ended_handoffs_get_nothing(pair: Pair, end: str) -> None:
    proof = pair.offer(ttl_s=0.05 if end == "expired" else 30)
    if end == "released":
        pair.reader.submit_release(pair.owner_id, proof, used=False)
    elif end == "aborted":
        pair.owner.abort(proof.handoff_id, "given up")
    (ended,) = take_ended(pair.owner)
    assert ended.state == end
    fails(pair.read(replace(proof, reader="late")), HandoffRefused, end)
    assert not pair.local.bytes.any()


def test_an_unknown_peer(pair: Pair) -> None:
    handle = pair.reader.submit_read(PeerId("nobody", 0), pair.offer(), never_planned, 1)
    fails(handle, PeerUnknown)


def test_another_layout_hash_is_told_before_anything_is_asked(pair: Pair) -> None:
    with pair.engine("other", layout_hash="different"):
        proof = replace(pair.offer(), incarnation="other-1")
        handle = pair.reader.submit_read(PeerId("other", 0), proof, never_planned, 5)
        fails(handle, LayoutMismatch, "different")


def test_an_engine_of_another_layout_may_say_that_it_will_not_read(pair: Pair) -> None:
    with pair.engine("other", layout_hash="different") as other:
        proof = pair.offer()
        fails(other.submit_read(pair.owner_id, proof, never_planned, 5), LayoutMismatch)

        other.submit_release(pair.owner_id, proof, used=False)

        (ended,) = take_ended(pair.owner)
        assert ended.state is HandoffState.RELEASED


def test_an_owner_is_read_by_no_other_transport_than_its_own() -> None:
    """Not even over TCP, whose port is open for control."""
    if why := why_no_process_memory():
        pytest.skip(why)
    with engine_pair(settings=TransferCase("shm", {"transports": ["shm"]}).settings()) as pair:
        other = pair.engine("other", settings=TransferSettings(transports=("tcp",)))
        other.register(pair.local.address, pair.local.bytes.nbytes)
        with other:
            handle = pair.with_reader(other, pair.local).read(pair.offer())
            fails(handle, TransportUnavailable, "settings forbid")
    assert not pair.local.bytes.any()
