"""What devices say when a read must not or cannot be done, and which error that becomes."""

from __future__ import annotations

import pytest

from tests.support.transfers.rdma_ends import Ends, stretched, until_ended, with_keys
from transfer.errors import HandoffRefused, PeerUnreachable, RegistrationError
from transfer.transports.rdma.completion import Status, error_of
from transfer.transports.rdma.handshake import encode_request
from transfer.transports.rdma.verbs import binding
from transfer.transports.rdma.work import BATCH_ROWS
from transfer.types import ReadPlan


def kind_of(status: int) -> type:
    return type(error_of(status, "device", "peer", "handoff"))


def whole(ends: Ends) -> bool:
    return bool((ends.local.bytes == ends.remote.bytes).all())


def test_a_read_brings_every_byte(ends: Ends) -> None:
    assert ends.read(ends.plan()) == Status.SUCCESS
    assert whole(ends)


def test_a_driver_without_extended_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pyverbs = binding.load()

    def refuse(*_: object) -> None:
        raise pyverbs.error("not supported")

    monkeypatch.setattr(pyverbs.qp, "QPEx", refuse)
    with Ends() as ends:
        assert ends.read(ends.plan()) == Status.SUCCESS
        assert whole(ends)


def test_a_wrong_key_of_the_owners(ends: Ends) -> None:
    wrong = with_keys(ends.owner_memory.remote, 0x1234_5678)
    status = ends.read(ends.plan(), remote_keys=wrong)
    assert status == Status.REM_ACCESS_ERR
    assert kind_of(status) is HandoffRefused
    assert not ends.local.bytes.any()


def test_past_the_end_of_the_owners_region(ends: Ends) -> None:
    plan = ends.plan(range(1))
    beyond = plan.remote.copy()
    beyond[0, 0] += ends.remote.bytes.nbytes
    status = ends.read(
        ReadPlan(plan.local, beyond), remote_keys=stretched(ends.owner_memory.remote, 1 << 20)
    )
    assert status == Status.REM_ACCESS_ERR
    assert not ends.local.bytes.any()


def test_a_region_that_the_owner_unregistered(ends: Ends) -> None:
    keys = ends.owner_memory.remote
    assert ends.read(ends.plan(), remote_keys=keys) == Status.SUCCESS
    ends.local.bytes.fill(0)
    ends.owner_memory.remove(ends.remote.address, ends.remote.bytes.nbytes)
    assert ends.read(ends.plan(), remote_keys=keys) == Status.REM_ACCESS_ERR
    assert not ends.local.bytes.any()


def test_a_region_that_was_registered_twice_stays_until_both_are_gone(ends: Ends) -> None:
    where = ends.remote.address, ends.remote.bytes.nbytes
    ends.owner_memory.add(*where)
    ends.owner_memory.remove(*where)
    assert ends.read(ends.plan()) == Status.SUCCESS


def test_a_wrong_key_of_our_own(ends: Ends) -> None:
    wrong = with_keys(ends.reader_memory.local, 0x1234_5678)
    status = ends.read(ends.plan(range(1)), local_keys=wrong)
    assert kind_of(status) is RegistrationError
    assert not ends.local.bytes.any()


def test_after_a_failure_the_rest_is_flushed_and_a_new_pair_works(ends: Ends) -> None:
    wrong = with_keys(ends.owner_memory.remote, 0x1234_5678)
    assert ends.read(ends.plan(), remote_keys=wrong) == Status.REM_ACCESS_ERR
    assert ends.lane.broken
    assert not ends.lane.has_room
    (left,) = ends.lane.close()
    assert left.size_bytes == ends.local.bytes.nbytes
    ends.attachment.exchange(encode_request((), [ends.lane.far_number]))
    assert ends.read(ends.plan(), lane=ends.new_lane()) == Status.SUCCESS
    assert whole(ends)


def test_an_owner_that_closed_its_end(ends: Ends) -> None:
    ends.attachment.close()
    status = ends.read(ends.plan())
    assert status == Status.RETRY_EXC_ERR
    assert kind_of(status) is PeerUnreachable
    assert not ends.local.bytes.any()


def test_closing_stops_what_is_under_way(ends: Ends) -> None:
    lane = ends.lane
    work = ends.work(ends.plan())
    for _ in range(4):
        lane.post(work.batches[0], work)
    assert not lane.has_room
    lane.close()
    ends.local.bytes.fill(7)
    assert ends.read(ends.plan(range(1)), lane=ends.new_lane()) == Status.SUCCESS
    assert (ends.local.bytes[ends.local.block_bytes :] == 7).all()


def test_more_requests_than_the_queue_is_deep(ends: Ends) -> None:
    """Only every last one of a batch says that it is done; the others make room all the same."""
    row = ends.plan(range(1))
    many = ReadPlan(row.local.repeat(BATCH_ROWS, axis=0), row.remote.repeat(BATCH_ROWS, axis=0))
    work = ends.work(many)
    for _ in range(12):
        ends.lane.post(work.batches[0], work)
        assert until_ended(ends.lane, work.batches[0].size_bytes) == Status.SUCCESS
    assert ends.local.block(0) == ends.remote.block(0)
