from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.engine.memory import MemoryTable
from transfer.errors import Phase, RegistrationError
from transfer.types import DmaBuf, SpanArray

REGIONS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 20), st.booleans()), min_size=1, max_size=6
)


class Watcher:
    def __init__(self) -> None:
        self.known: list[tuple[int, int, DmaBuf | None]] = []

    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None:
        self.known.append((address, length, dmabuf))

    def remove_memory(self, address: int, length: int) -> None:
        self.known = [one for one in self.known if one[:2] != (address, length)]


def span(at: int, size: int) -> SpanArray:
    return np.array([[at, size]], dtype=np.uint64)


@given(REGIONS, st.integers(1, 80), st.integers(1, 30))
def test_a_byte_of_a_device_is_enough(
    regions: list[tuple[int, int, bool]], at: int, size: int
) -> None:
    table = MemoryTable(Watcher())
    for address, length, device in regions:
        table.register(address, length, DmaBuf(fd=3) if device else None)
    of_devices = {
        byte
        for address, length, device in regions
        if device
        for byte in range(address, address + length)
    }
    touched = not of_devices.isdisjoint(range(at, at + size))
    assert table.touches_devices(span(at, size)) is touched


def test_transports_are_told_of_dma_bufs() -> None:
    watcher = Watcher()
    table = MemoryTable(watcher)
    buffer = DmaBuf(fd=3, offset=512)
    region = table.register(4096, 100, buffer)
    assert watcher.known == [(4096, 100, buffer)]
    assert "device" in repr(region)
    table.check(span(4100, 50), what="spans", phase=Phase.READ)
    region.close()
    assert watcher.known == []
    assert not table.touches_devices(span(4100, 50))
    with pytest.raises(RegistrationError, match="spans are not all in registered memory"):
        table.check(span(4100, 50), what="spans", phase=Phase.READ)
