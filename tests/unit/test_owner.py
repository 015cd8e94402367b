"""What an owner does in one step for a small read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from transfer.engine.handoff import Offer
from transfer.engine.handoffs import HandoffTable
from transfer.engine.memory import MemoryTable
from transfer.engine.owner import Owner
from transfer.errors import HandoffRefused, Phase
from transfer.transports.base import Caller
from transfer.types import Credentials, PeerId, PeerInfo, SpanArray


class NoWatcher:
    def add_memory(self, address: int, length: int) -> None: ...

    def remove_memory(self, address: int, length: int) -> None: ...


class SlowMemory(MemoryTable):
    """Takes time to check spans, which happens between admission and release."""

    def __init__(self) -> None:
        super().__init__(NoWatcher())
        self.now_s = 0.0
        self.check_s = 1.0

    def check(self, spans: SpanArray, *, what: str, phase: Phase) -> None:
        self.now_s += self.check_s


def test_a_fetch_is_refused_when_the_hand_off_ended_while_bytes_were_copied() -> None:
    memory = SlowMemory()
    table = HandoffTable("i", lambda: memory.now_s, on_end=lambda: None)
    data = np.arange(64, dtype=np.uint8)
    grant = np.array([[data.ctypes.data, 64]], dtype=np.uint64)
    table.offer(Offer("h", 1, "t", grant, readers=2, ttl_s=5.0, num_blocks=1))
    owner = Owner(PeerInfo(PeerId("o", 0), "i", "h", b""), table, memory)
    caller = Caller(PeerId("r", 0), "r-1")
    proof = Credentials("h", "i", 1, "t", "first")

    assert owner.fetch(caller, proof, grant) == data.tobytes()
    memory.check_s = 10.0
    with pytest.raises(HandoffRefused, match="not renewed"):
        owner.fetch(caller, replace(proof, reader="second"), grant)
