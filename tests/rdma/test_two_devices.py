"""Reads spread over two devices, and by the one that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.transfers.cases import need_rdma_devices
from tests.support.transfers.engines import Buffer, Directory, Pair, make_engine, succeeds
from transfer.settings import TransferSettings
from transfer.transports.rdma.owner import RdmaAttachment
from transfer.transports.rdma.rails import Rail, close_rails, open_rails
from transfer.transports.rdma.verbs.device import device_names

NUM_BLOCKS, BLOCK_BYTES = 128, 65_536


@pytest.fixture
def devices() -> list[str]:
    """Two devices that reach each other."""
    need_rdma_devices(2)
    return device_names()[:2]


def make_next_numbers_equal(devices: list[str]) -> None:
    """Each device numbers its queue pairs by itself, one after the other."""
    rails = open_rails(",".join(devices), -1)

    def number(rail: Rail) -> int:
        completions = rail.device.completion_queue(1, events=False)
        pair = rail.device.queue_pair(completions, 1)
        pair.close()
        completions.close()
        return pair.number

    found = {number(rail): rail for rail in rails}
    behind = found[min(found)]
    while len(found) > 1 and number(behind) < max(found):
        pass
    close_rails(rails)


def test_owners_keep_the_queue_pairs_of_both(
    devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_next_numbers_equal(devices)
    kept: list[int] = []
    exchange = RdmaAttachment.exchange

    def count(self: RdmaAttachment, request: bytes) -> bytes:
        answer = exchange(self, request)
        kept.append(len(self._ends))
        return answer

    monkeypatch.setattr(RdmaAttachment, "exchange", count)
    read_over(",".join(devices), ",".join(devices))
    assert kept == [2]


def requests_served(device: str) -> int:
    """Packets that a device received; a counter of soft-RoCE's."""
    path = Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts")
    if not path.exists():
        pytest.skip(f"{device} does not count its packets")
    return int(path.read_text())


def read_over(owner_devices: str, reader_devices: str) -> None:
    directory = Directory()
    remote, local = Buffer(NUM_BLOCKS, BLOCK_BYTES), Buffer(NUM_BLOCKS, BLOCK_BYTES, fill=0)
    tuning = [
        TransferSettings(transports=("rdma",), rdma_device=devices)
        for devices in (owner_devices, reader_devices)
    ]
    owner = make_engine(directory, "owner", settings=tuning[0])
    reader = make_engine(directory, "reader", settings=tuning[1])
    owner.register(remote.address, remote.bytes.nbytes)
    reader.register(local.address, local.bytes.nbytes)
    with owner, reader:
        pair = Pair(directory, owner, reader, remote, local, tuning[1])
        succeeds(pair.read(pair.offer()))
        assert pair.local_is_remote()


def test_both_devices_carry_a_read(devices: list[str]) -> None:
    first, second = devices
    before = [requests_served(name) for name in devices]
    # Crossed, so that every packet takes the cable.
    read_over(f"{second},{first}", f"{first},{second}")
    carried = [
        after - since for after, since in zip(map(requests_served, devices), before, strict=True)
    ]
    assert min(carried) > sum(carried) / 4


@pytest.mark.parametrize("ports", ["", ":1"])
def test_the_device_that_is_named_carries_it(devices: list[str], ports: str) -> None:
    first, second = devices
    before = requests_served(first)
    read_over(second + ports, second + ports)
    assert requests_served(first) == before


def test_different_numbers_of_devices(devices: list[str]) -> None:
    first, second = devices
    read_over(f"{first},{second}", second)
    read_over(first, f"{second},{first}")


def test_a_device_that_fails_leaves_the_read_to_the_other(
    devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = devices
    exchange = RdmaAttachment.exchange

    def lose_one(self: RdmaAttachment, request: bytes) -> bytes:
        answer = exchange(self, request)
        self._drop(next(iter(self._ends)))
        return answer

    monkeypatch.setattr(RdmaAttachment, "exchange", lose_one)
    read_over(f"{second},{first}", f"{first},{second}")
