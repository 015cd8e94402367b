"""What an owner does in one step for a small read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from transfer.engine.handoff import HandoffState, Offer
from transfer.engine.handoffs import HandoffTable
from transfer.engine.memory import MemoryTable
from transfer.engine.owner import Owner
from transfer.errors import HandoffRefused, Phase, TransportUnavailable
from transfer.transports.base import Caller
from transfer.types import Credentials, DmaBuf, PeerId, PeerInfo, SpanArray

CALLER = Caller(PeerId("r", 0), "r-1")
PROOF = Credentials("h", "i", 1, "t", "first")
DATA = np.arange(64, dtype=np.uint8)
GRANT: SpanArray = np.array([[DATA.ctypes.data, 64]], dtype=np.uint64)


class NoWatcher:
    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None: ...

    def remove_memory(self, address: int, length: int) -> None: ...


class SlowMemory(MemoryTable):
    """Stays within a check of spans, that is between admission and release, until told."""

    def __init__(self) -> None:
        super().__init__(NoWatcher())
        self.entered = threading.Event()
        self.leave = threading.Event()

    def check(self, spans: SpanArray, *, what: str, phase: Phase) -> None:
        self.entered.set()
        assert self.leave.wait(20)
        super().check(spans, what=what, phase=phase)


@pytest.fixture
def memory() -> Iterator[SlowMemory]:
    made = SlowMemory()
    yield made
    made.leave.set()


def offered(memory: SlowMemory, readers: int) -> tuple[HandoffTable, Owner]:
    table = HandoffTable("i", time.monotonic, on_end=lambda: None)
    table.offer(Offer("h", 1, "t", GRANT, readers=readers, ttl_s=60.0, num_blocks=1))
    return table, Owner(PeerInfo(PeerId("o", 0), "i", "h", b""), table, memory)


def test_a_hand_off_cannot_end_while_a_fetch_copies(memory: SlowMemory) -> None:
    memory.register(DATA.ctypes.data, 64)
    table, owner = offered(memory, readers=2)
    fetched: list[bytes] = []
    fetching = threading.Thread(target=lambda: fetched.append(owner.fetch(CALLER, PROOF, GRANT)))
    fetching.start()
    assert memory.entered.wait(20)
    ending = threading.Thread(target=table.abort, args=("h", "test"))
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()

    memory.leave.set()
    fetching.join(20)
    ending.join(20)
    assert fetched == [DATA.tobytes()]
    (ended,) = table.take_ended()
    assert ended.state is HandoffState.ABORTED
    with pytest.raises(HandoffRefused, match="aborted"):
        owner.fetch(CALLER, replace(PROOF, reader="second"), GRANT)


def test_a_fetch_counts_its_reader_off_only_with_the_bytes(memory: SlowMemory) -> None:
    memory.leave.set()
    table, owner = offered(memory, readers=1)
    with pytest.raises(HandoffRefused, match="registered memory"):
        owner.fetch(CALLER, PROOF, GRANT)
    assert [offer.readers_left for offer in table.snapshot()] == [1]

    memory.register(DATA.ctypes.data, 64)
    assert owner.fetch(CALLER, PROOF, GRANT) == DATA.tobytes()
    (ended,) = table.take_ended()
    assert ended.state is HandoffState.RELEASED


def test_no_processor_reads_memory_of_a_device(memory: SlowMemory) -> None:
    memory.leave.set()
    memory.register(DATA.ctypes.data, 32)
    memory.register(DATA.ctypes.data + 32, 32, DmaBuf(fd=-1))
    table, owner = offered(memory, readers=2)
    last_byte = np.array([[DATA.ctypes.data + 63, 1]], dtype=np.uint64)
    for rows in (GRANT, last_byte):
        with pytest.raises(TransportUnavailable, match="only rdma"):
            owner.fetch(CALLER, PROOF, rows)
        with pytest.raises(TransportUnavailable, match="only rdma"):
            owner.begin_read(CALLER, PROOF, rows, lambda: None)
        owner.begin_one_sided_read(CALLER, PROOF, rows, "a read")
    host = np.array([[DATA.ctypes.data, 32]], dtype=np.uint64)
    assert owner.fetch(CALLER, PROOF, host) == DATA[:32].tobytes()
    table.abort("h", "test")
    assert len(table.take_ended()) == 1
