"""How long an RDMA read waits for new queue pairs when its own have broken."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import pytest

from transfer.errors import PeerUnreachable, Phase
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.lane import Lane
from transfer.transports.rdma.lane_pool import LanePool
from transfer.transports.rdma.owner_keys import AdmittedRead, OwnerKeys
from transfer.transports.rdma.session import RdmaReadSession
from transfer.transports.rdma.work import Work
from transfer.types import ReadPlan

SPANS = np.array([[4096, 64]], dtype=np.uint64)
KEYS = KeyMap.of([(4096, 64, 4096, (1,))], 1)


class BrokenLane:
    broken = True

    def close(self) -> list[Any]:
        return []


class Pool:
    """Notes how long new lanes may take."""

    peer = "owner/0"
    hangup_fd = -1

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    def take_new(self, timeout_s: float) -> list[Any]:
        self.waits_s.append(timeout_s)
        return []

    def discard(self, lanes: list[Any]) -> None:
        pass

    give_back = discard


@pytest.mark.parametrize(("left_s", "wait_s"), [(60.0, 5.0), (2.0, 2.0), (-1.0, 0.0)])
def test_new_queue_pairs_have_no_more_time_than_the_read(left_s: float, wait_s: float) -> None:
    pool = Pool()
    session = RdmaReadSession(
        AdmittedRead("h", "id", KEYS, keys_are_fresh=True, deadline=time.monotonic() + left_s),
        Work([ReadPlan(SPANS, SPANS)], KEYS, KEYS),
        [cast(Lane, BrokenLane())],
        cast(LanePool, pool),
        cast(OwnerKeys, None),
    )
    with session:
        session._recover(PeerUnreachable("broken", phase=Phase.READ))
    assert pool.waits_s == [pytest.approx(wait_s, abs=0.5)]
