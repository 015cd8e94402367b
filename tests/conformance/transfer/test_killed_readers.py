"""Readers in other processes that are killed: their owner, in this one, goes on without them."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.processes.leaks import open_descriptors, rdma_resources
from tests.support.processes.waiting import SLOWNESS, wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import Pair, engine_pair, succeeds, take_ended
from tests.support.transfers.reader_process import HALF_WAY_BYTES, READER, reader_process
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferState
from transfer.engine.handoff import HandoffState

NUM_BLOCKS = 256
BLOCK_BYTES = 65_536
BOUND_S = 2.0 * SLOWNESS


def kept_for_readers(case: TransferCase) -> dict[str, int]:
    """What the owner keeps open: connections, each with a thread, and RDMA resources."""
    threads = [one.name for one in threading.enumerate()]
    return {
        "connections": sum(name.startswith("baton-serve-") for name in threads),
        "descriptors": len(open_descriptors()),
        **(rdma_resources() if case.name == "rdma" else {}),
    }


def sends_under_way(owner: TransferEngine) -> int:
    table = owner._table
    return sum(len(handoff.permits) for handoff in [*table._live.values(), *table._untaken])


def another_reader_is_served(pair: Pair) -> None:
    pair.local.bytes.fill(0)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    assert [one.state for one in take_ended(pair.owner)] == [HandoffState.RELEASED]


@pytest.mark.parametrize(
    "phase", [TransferState.CONNECTING, TransferState.READING, TransferState.CONFIRMING]
)
def test_a_reader_that_is_killed(case: TransferCase, phase: TransferState) -> None:
    with engine_pair(NUM_BLOCKS, BLOCK_BYTES, settings=case.settings()) as pair:
        another_reader_is_served(pair)  # whose connections are there from now on
        before = kept_for_readers(case)
        proof = pair.offer()
        pair.directory.publish(READER)
        with reader_process(pair, case, proof, phase) as (process, report):
            assert (report.state, report.error) == (phase, "")
            kept = kept_for_readers(case)
            assert kept["connections"] > before["connections"]
            if phase is TransferState.READING:
                assert HALF_WAY_BYTES < report.bytes_there < pair.local.bytes.nbytes
                assert bool(sends_under_way(pair.owner)) is not case.one_sided
            if case.name == "rdma":
                assert kept["qp"] > before["qp"]
            another_reader_is_served(pair)
            process.kill()
            process.wait()
            another_reader_is_served(pair)
        assert wait_until(lambda: kept_for_readers(case) == before, BOUND_S), (
            before,
            kept_for_readers(case),
        )
        assert wait_until(lambda: not sends_under_way(pair.owner), BOUND_S)
        if phase is TransferState.CONNECTING:
            # It never began to read: whoever else has its ticket still can.
            succeeds(pair.read(proof))
        pair.directory.withdraw(READER.peer)
        (ended,) = take_ended(pair.owner)
        assert ended.handoff_id == proof.handoff_id
        if phase is not TransferState.CONNECTING:
            assert (ended.state, ended.reason) == (HandoffState.ABORTED, "reader doomed/0 died")
        begun = time.monotonic()
        pair.owner.close()
        assert time.monotonic() - begun < BOUND_S
