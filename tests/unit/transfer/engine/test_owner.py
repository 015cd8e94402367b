"""What an owner lets its listeners send."""

from __future__ import annotations

import time

import numpy as np
import pytest

from transfer.engine.handoff import Offer
from transfer.engine.memory import MemoryTable
from transfer.engine.owning.handoffs import HandoffTable
from transfer.engine.owning.owner import Owner
from transfer.errors import HandoffRefused, TransportUnavailable
from transfer.types import Claim, DmaBuf, PeerId, PeerInfo, ReaderProcess, SpanArray

READER = ReaderProcess(PeerId("r", 0), "r-1")
CLAIM = Claim("h", "i", 1, "first")
DATA = np.arange(64, dtype=np.uint8)
GRANT: SpanArray = np.array([[DATA.ctypes.data, 64]], dtype=np.uint64)


class NoWatcher:
    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None: ...

    def remove_memory(self, address: int, length: int) -> None: ...


def offered(memory: MemoryTable) -> tuple[HandoffTable, Owner]:
    table = HandoffTable("i", time.monotonic, on_end=lambda: None)
    table.offer(Offer("h", 1, "t", GRANT, readers=1, ttl_s=60.0))
    return table, Owner(PeerInfo(PeerId("o", 0), "i", "h", b""), table, memory)


def test_what_is_not_registered_any_more_is_refused_and_not_kept() -> None:
    table, owner = offered(MemoryTable(NoWatcher()))
    with pytest.raises(HandoffRefused, match="registered memory"):
        owner.begin_read(READER, CLAIM, GRANT, lambda: None)
    table.abort("h", "test")
    assert len(table.take_ended()) == 1


def test_no_processor_reads_memory_of_a_device() -> None:
    memory = MemoryTable(NoWatcher())
    memory.register(DATA.ctypes.data, 32)
    memory.register(DATA.ctypes.data + 32, 32, DmaBuf(fd=-1))
    table, owner = offered(memory)
    last_byte = np.array([[DATA.ctypes.data + 63, 1]], dtype=np.uint64)
    for rows in (GRANT, last_byte):
        with pytest.raises(TransportUnavailable, match="only rdma"):
            owner.begin_read(READER, CLAIM, rows, lambda: None)
        owner.begin_one_sided_read(READER, CLAIM, rows, "a read")
    host = np.array([[DATA.ctypes.data, 32]], dtype=np.uint64)
    owner.end_read(owner.begin_read(READER, CLAIM, host, lambda: None))
    table.abort("h", "test")
    assert len(table.take_ended()) == 1


def test_a_permit_of_somebody_else_is_not_kept_in_silence() -> None:
    class Foreign:
        valid = True

    _, owner = offered(MemoryTable(NoWatcher()))
    with pytest.raises(TypeError, match="not a permit that this owner gave"):
        owner.end_read(Foreign())
