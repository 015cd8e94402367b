"""Exporting CUDA memory, with another driver in place of CUDA's."""

from __future__ import annotations

import pytest

from transfer.cuda import CudaDriver, export
from transfer.errors import TransportUnavailable
from transfer.types import DmaBuf

ORDERING, SUPPORTED = 118, 124


class FakeDriver:
    def __init__(self, ordering: int = 100, supported: int = 1) -> None:
        self._values = {ORDERING: ordering, SUPPORTED: supported}
        self.exported: list[tuple[int, int]] = []

    def device_of(self, address: int) -> int:
        return 2

    def attribute(self, device: int, number: int) -> int:
        assert device == 2
        return self._values[number]

    def dmabuf_fd(self, address: int, length: int) -> int:
        self.exported.append((address, length))
        return 7


@pytest.mark.parametrize(
    ("address", "length", "pages", "offset"),
    [
        (0x7F00_0000_0000, 8192, (0x7F00_0000_0000, 8192), 0),
        (0x7F00_0000_0200, 8192, (0x7F00_0000_0000, 12288), 512),
        (0x7F00_0000_0FFF, 1, (0x7F00_0000_0000, 4096), 4095),
    ],
)
def test_whole_pages_are_exported(
    monkeypatch: pytest.MonkeyPatch,
    address: int,
    length: int,
    pages: tuple[int, int],
    offset: int,
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096)
    driver = FakeDriver()
    assert export(address, length, driver) == DmaBuf(fd=7, offset=offset)
    assert driver.exported == [pages]


def test_a_device_without_dma_bufs_is_refused() -> None:
    driver = FakeDriver(supported=0)
    with pytest.raises(TransportUnavailable, match="device 2 does not export"):
        export(4096, 4096, driver)
    assert driver.exported == []


def test_a_device_that_does_not_order_writes_is_refused() -> None:
    driver = FakeDriver(ordering=0)
    with pytest.raises(TransportUnavailable, match="device 2 does not order"):
        export(4096, 4096, driver)
    assert driver.exported == []


def test_a_machine_without_cuda_says_so() -> None:
    with pytest.raises(TransportUnavailable, match=r"no dma-buf of CUDA memory: .*libnosuch"):
        CudaDriver("libnosuch.so.1")
