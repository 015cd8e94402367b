"""Memory of another device, which no processor may touch.

Soft-RoCE takes no dma-buf. So host memory stands for a device's here, and engines know it under an
address at which nothing is mapped: whoever touches it otherwise than by RDMA is killed by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import Buffer, Directory, Pair, make_engine, succeeds
from transfer.errors import RegistrationError
from transfer.settings import TransferSettings
from transfer.transports.rdma.verbs.device import OpenDevice, Registration
from transfer.types import DmaBuf, ReadPlan

NUM_BLOCKS = 64
# Behind what Linux gives to processes on x86-64 and on arm64 alike.
NOWHERE = 1 << 57


class DeviceBuffer(Buffer):
    """Under an address of its own; ``bytes`` are where they really are."""

    at = NOWHERE

    @property
    def address(self) -> int:
        return self.at


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, Buffer]:
    """Device memory by the descriptor of its dma-buf: as RDMA devices would see it."""
    known: dict[int, Buffer] = {}
    register = OpenDevice.register

    def resolved(
        device: OpenDevice, address: int, length: int, dmabuf: DmaBuf | None = None
    ) -> Registration:
        if dmabuf is None or dmabuf.fd not in known:
            return register(device, address, length, dmabuf)
        inside = int(known[dmabuf.fd].bytes.ctypes.data) + dmabuf.offset
        made = register(device, inside, length)
        assert made.base == inside != address
        return made

    monkeypatch.setattr(OpenDevice, "register", resolved)
    return known


def device_buffer(devices: dict[int, Buffer], fill: int | None = None) -> DeviceBuffer:
    buffer = DeviceBuffer(NUM_BLOCKS, fill=fill)
    fd = 1000 + len(devices)
    buffer.at = NOWHERE + (len(devices) << 40)
    devices[fd] = buffer
    return buffer


@pytest.fixture(params=["owner", "reader", "both"])
def pair(
    request: pytest.FixtureRequest, devices: dict[int, Buffer], case: TransferCase
) -> Iterator[Pair]:
    """An owner and a reader, one or both with memory of a device."""
    where, settings = request.param, case.settings()
    remote: Buffer = Buffer(NUM_BLOCKS)
    local: Buffer = Buffer(NUM_BLOCKS, fill=0)
    if where in ("owner", "both"):
        remote = device_buffer(devices)
    if where in ("reader", "both"):
        local = device_buffer(devices, fill=0)
    directory = Directory()
    ends = [make_engine(directory, name, settings=settings) for name in ("owner", "reader")]
    for engine, buffer in zip(ends, (remote, local), strict=True):
        fds = [fd for fd, known in devices.items() if known is buffer]
        engine.register(buffer.address, buffer.bytes.nbytes, *map(DmaBuf, fds))
    owner, reader = ends
    with owner, reader:
        yield Pair(directory, owner, reader, remote, local, settings)


def test_blocks_of_devices_are_read(pair: Pair) -> None:
    blocks = range(0, NUM_BLOCKS, 2)
    plan = ReadPlan(pair.local.spans(blocks), pair.remote.spans(blocks))
    succeeds(pair.read(pair.offer(), plan))
    for block in range(NUM_BLOCKS):
        wanted = pair.remote.block(block) if block % 2 == 0 else bytes(pair.local.block_bytes)
        assert pair.local.block(block) == wanted


def test_part_of_a_dma_buf_beside_host_memory(
    devices: dict[int, Buffer], case: TransferCase
) -> None:
    behind = device_buffer(devices)
    host, local = Buffer(4), Buffer(8, fill=0)
    directory = Directory()
    owner = make_engine(directory, "owner", settings=case.settings())
    reader = make_engine(directory, "reader", settings=case.settings())
    half = behind.bytes.nbytes // 2
    owner.register(behind.address + half, half, DmaBuf(1000, offset=half))
    owner.register(host.address, host.bytes.nbytes)
    reader.register(local.address, local.bytes.nbytes)
    remote = np.concatenate(
        [behind.spans(range(NUM_BLOCKS // 2, NUM_BLOCKS // 2 + 4)), host.spans(range(4))]
    )
    with owner, reader:
        pair = Pair(directory, owner, reader, host, local, case.settings())
        succeeds(pair.read(pair.offer(grant=remote), ReadPlan(local.spans(range(8)), remote)))
    assert local.bytes.tobytes() == (
        behind.bytes[half : half + 4 * 4096].tobytes() + host.bytes.tobytes()
    )


@pytest.mark.parametrize("transports", ["auto", ["tcp"], ["rdma", "tcp"]])
def test_device_memory_is_only_for_engines_that_use_nothing_else(
    transports: str | list[str],
) -> None:
    engine = make_engine(
        Directory(),
        "owner",
        settings=TransferSettings(transports=transports),  # type: ignore[arg-type]  # lists are what files give
    )
    with pytest.raises(RegistrationError, match=r"device memory needs transports: \[rdma\]"):
        engine.register(NOWHERE, 4096, DmaBuf(1000))


@pytest.fixture
def no_dmabuf() -> Iterator[DmaBuf]:
    """Taken by no device; soft-RoCE would not even take a real one."""
    file = os.memfd_create("no dma-buf")
    yield DmaBuf(file)
    os.close(file)


def test_an_engine_does_not_start_with_what_a_device_does_not_take(
    case: TransferCase, no_dmabuf: DmaBuf
) -> None:
    engine = make_engine(Directory(), "owner", settings=case.settings())
    engine.register(NOWHERE, 4096, no_dmabuf)
    with pytest.raises(RegistrationError, match="does not take memory of other devices"):
        engine.start()
    engine.close()


def test_what_a_device_does_not_take_later_leaves_the_rest_as_it_was(
    pair: Pair, no_dmabuf: DmaBuf
) -> None:
    with pytest.raises(RegistrationError, match="does not take memory of other devices"):
        pair.owner.register(NOWHERE - (1 << 40), 4096, no_dmabuf)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
