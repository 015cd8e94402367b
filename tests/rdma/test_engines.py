"""Two engines over RDMA when something changes or breaks between them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.processes.waiting import wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Buffer,
    Directory,
    Pair,
    engine_pair,
    fails,
    make_engine,
    succeeds,
)
from tests.support.transfers.owner_process import owner_process
from tests.support.transfers.stalling_lanes import StallingLanes
from transfer.errors import (
    ConfigurationError,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    TransportUnavailable,
)
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.transports.rdma.owner import RdmaAttachment
from transfer.transports.rdma.verbs.device import OpenDevice, Registration
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.types import ReadPlan


def routes_said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "reads from" in record.getMessage()]


def drop_queue_pairs(attachment: RdmaAttachment) -> None:
    for number in list(attachment._ends):
        attachment._drop(number)


def test_rdma_is_preferred_to_tcp(either: Pair, caplog: pytest.LogCaptureFixture) -> None:
    succeeds(either.read(either.offer()))
    assert either.local_is_remote()
    (said,) = routes_said(caplog)
    assert "rdma" in said


def test_memory_that_was_registered_anew(pair: Pair) -> None:
    succeeds(pair.read(pair.offer()))
    region = pair.owner.register(pair.remote.address, pair.remote.bytes.nbytes)
    more = Buffer(4)
    again = pair.owner.register(more.address, more.bytes.nbytes)
    plan = ReadPlan(pair.local.spans(range(4)), more.spans(range(4)))
    succeeds(pair.read(pair.offer(grant=more.spans(range(4))), plan))
    again.close()
    again = pair.owner.register(more.address, more.bytes.nbytes)
    pair.local.bytes.fill(0)
    # The reader still has the old keys and notices.
    succeeds(pair.read(pair.offer(grant=more.spans(range(4))), plan))
    assert [pair.local.block(n) for n in range(4)] == [more.block(n) for n in range(4)]
    region.close()
    again.close()


def test_memory_that_is_unregistered_while_it_is_read(case: TransferCase) -> None:
    with engine_pair(128, 65_536, settings=case.settings(slice_bytes=65_536)) as pair:
        more = Buffer(256, 65_536)
        region = pair.owner.register(more.address, more.bytes.nbytes)
        ids = range(128)
        plan = ReadPlan(pair.local.spans(ids), more.spans(ids))
        proof = pair.offer(grant=more.spans(ids))
        with StallingLanes(pair.owner.addresses[0], 1 << 20) as stall:
            handle = pair.read(proof, plan)
            assert wait_until(lambda: handle.bytes_moved >= 1 << 20)
            region.close()
            stall.resume()
            fails(handle, HandoffRefused)


def test_regions_that_touch_are_read_across(pair: Pair) -> None:
    remote, local = Buffer(8), Buffer(8, fill=0)
    half = remote.bytes.nbytes // 2
    for at in (0, half):
        pair.owner.register(remote.address + at, half)
    third = 3 * 4096
    pair.reader.register(local.address, third)
    pair.reader.register(local.address + third, local.bytes.nbytes - third)
    plan = ReadPlan(local.spans(range(8)), remote.spans(range(8)))
    succeeds(pair.read(pair.offer(grant=plan.remote), plan))
    assert np.array_equal(local.bytes, remote.bytes)


def test_queue_pairs_that_broke_while_idle_are_replaced(
    pair: Pair, attachments: list[RdmaAttachment]
) -> None:
    succeeds(pair.read(pair.offer()))
    drop_queue_pairs(attachments[0])
    pair.local.bytes.fill(0)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    assert len(attachments) == 1


def test_an_owner_that_cannot_connect_any_is_read_over_tcp(
    monkeypatch: pytest.MonkeyPatch, either: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> bytes:
        raise TransportUnavailable("no queue pair left", phase=Phase.CONNECT)

    monkeypatch.setattr(RdmaAttachment, "exchange", refuse)
    succeeds(either.read(either.offer()))
    assert either.local_is_remote()
    (said,) = routes_said(caplog)
    assert "tcp: no queue pair left" in said


def test_a_network_that_lets_no_packet_through_is_left_for_tcp(
    either: Pair,
    attachments: list[RdmaAttachment],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    succeeds(either.read(either.offer()))
    exchange = RdmaAttachment.exchange

    def connect_and_drop(self: RdmaAttachment, request: bytes) -> bytes:
        answer = exchange(self, request)
        drop_queue_pairs(self)
        return answer

    monkeypatch.setattr(RdmaAttachment, "exchange", connect_and_drop)
    drop_queue_pairs(attachments[0])
    either.local.bytes.fill(0)
    handle = either.read(either.offer(), deadline_s=60)
    assert handle.wait(60)
    succeeds(handle)
    assert either.local_is_remote()
    assert "tcp" in routes_said(caplog)[-1]


def test_memory_that_the_device_does_not_take_goes_over_tcp(
    monkeypatch: pytest.MonkeyPatch, either: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> Registration:
        raise VerbsError(12, "Cannot allocate memory")

    monkeypatch.setattr(OpenDevice, "register", refuse)
    more = Buffer(4)
    either.owner.register(more.address, more.bytes.nbytes)
    assert "ulimit -l" in caplog.text
    plan = ReadPlan(either.local.spans(range(4)), more.spans(range(4)))
    succeeds(either.read(either.offer(grant=more.spans(range(4))), plan))
    assert either.local.block(3) == more.block(3)
    assert "tcp" in routes_said(caplog)[-1]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"rdma_device": "nothing0"}, "nothing0"),
        ({"rdma_device": ":1"}, ":1"),
        ({"rdma_gid_index": 200}, "200"),
    ],
)
def test_devices_that_are_not_there(setting: dict[str, object], why: str) -> None:
    engine = make_engine(
        Directory(),
        "lost",
        settings=TransferSettings(transports=("rdma", "tcp"), **setting),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigurationError, match=why):
        engine.start()
    engine.close()


def test_an_owner_that_is_killed_fails_the_read_soon(case: TransferCase) -> None:
    directory, local = Directory(), Buffer(256, 65_536, fill=0)
    engine = make_engine(directory, "reader", settings=case.settings(slice_bytes=65_536))
    engine.register(local.address, local.bytes.nbytes)
    forced = {**case.forced, "transports": ["rdma"]}
    with (
        engine,
        owner_process("owner-1", 256, 65_536, settings=forced) as (process, report),
        StallingLanes(report.address, 1 << 20) as stall,
    ):
        directory.publish(report.record)
        directory.move(report.record.peer, stall.address)
        blocks = np.arange(256)
        plan = ReadPlan(local.spans(blocks), block_spans(report.base, 65_536, 65_536, blocks))
        handle = engine.submit_read(report.record.peer, report.credentials(0), lambda _: plan, 60)
        assert wait_until(lambda: handle.bytes_moved >= 1 << 20, 20)
        process.kill()
        process.wait()
        fails(handle, PeerUnreachable)
