"""A reader in a process of its own that stays in one phase of a read until it is killed.

``python -m tests.support.transfers.reader_process``; says in one line of JSON
(:class:`ReaderReport`) when it is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import pytest

from tests.support.network.stalling_proxy import StallingProxy
from tests.support.processes.reporting_process import report, reporting_process
from tests.support.processes.waiting import SLOWNESS, wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import LAYOUT_HASH, Buffer, Directory, Pair, make_engine
from transfer.engine.handle import TransferState
from transfer.spans import block_spans
from transfer.transports.rdma.lane import Lane
from transfer.transports.tcp.control import TcpControl
from transfer.types import Credentials, PeerId, ReadPlan, WorkerRecord

READER = WorkerRecord(PeerId("doomed", 0), "doomed-1", "test", 1, (), LAYOUT_HASH, 0.0)
"""Its record; it has a directory of its own, so others learn of it only from the test."""

HALF_WAY_BYTES = 2 << 20
_STALL_AT_BYTES = 3 << 20
_PATIENCE_S = 20.0 * SLOWNESS


@dataclass(frozen=True)
class ReaderReport:
    """Where the reader stays; ``error`` is empty unless the read ended instead.

    Attributes:
        bytes_there: that it has in its memory, but for those that are 0.
    """

    state: str
    bytes_there: int
    error: str


@contextmanager
def reader_process(
    pair: Pair, case: TransferCase, proof: Credentials, phase: TransferState
) -> Iterator[tuple[subprocess.Popen[str], ReaderReport]]:
    """One more reader of ``pair``'s owner, which asks for its whole buffer. Killed at the end.

    Args:
        phase: where it stays. When connecting, the owner has just done its part: it has connected
            its queue pairs over RDMA, else begun the handshake, and its answer is held back. When
            reading, a part of the bytes is there; when confirming, they all are.
    """
    order = {
        "case": case.name,
        "forced": dict(case.forced),
        "phase": phase.value,
        "owner": pair.owner.addresses[0],
        "base": pair.remote.address,
        "num_blocks": pair.remote.num_blocks,
        "block_bytes": pair.remote.block_bytes,
        "proof": asdict(proof),
    }
    with reporting_process("tests.support.transfers.reader_process", json.dumps(order)) as (
        process,
        said,
    ):
        yield process, ReaderReport(**said)


def main() -> None:
    order = json.loads(sys.argv[1])
    case = TransferCase(order["case"], order["forced"])
    proof = Credentials(**order["proof"])
    local = Buffer(order["num_blocks"], order["block_bytes"], fill=0)
    blocks = np.arange(local.num_blocks)
    remote = block_spans(order["base"], local.block_bytes, local.block_bytes, blocks)
    address, is_there = _stay_in(TransferState(order["phase"]), case, order["owner"], local)
    directory = Directory()
    owner = PeerId("owner", 0)
    directory.publish(
        WorkerRecord(owner, proof.incarnation, "test", 1, (address,), LAYOUT_HASH, 0.0)
    )
    # An owner that sends is to be caught sending: with more than the sockets' buffers hold.
    slice_bytes = 256 << 10 if case.one_sided else local.bytes.nbytes
    engine = make_engine(
        directory,
        READER.peer.engine_id,
        incarnation=READER.incarnation,
        settings=case.settings(slice_bytes=slice_bytes, streams_per_peer=1),
    )
    engine.register(local.address, local.bytes.nbytes)
    engine.start()
    plan = ReadPlan(local.spans(blocks), remote)
    handle = engine.submit_read(owner, proof, lambda _: plan, 2 * _PATIENCE_S)
    wait_until(lambda: is_there() or handle.state.is_final, _PATIENCE_S)
    error = "" if handle.error is None else str(handle.error)
    report(asdict(ReaderReport(handle.state.value, _bytes_in(local), error)))
    os._exit(1)  # nobody kills it any more; what it holds up would never end


def _stay_in(
    phase: TransferState, case: TransferCase, owner: str, local: Buffer
) -> tuple[str, Callable[[], bool]]:
    """Where to reach the owner instead, and whether the read has got as far as it gets."""
    if phase is TransferState.READING:
        half_way = case.stalled(owner, _STALL_AT_BYTES)
        return half_way.address, lambda: _bytes_in(local) > HALF_WAY_BYTES
    if phase is TransferState.CONNECTING and case.name != "rdma":
        unanswered = StallingProxy(owner, 0)
        return unanswered.address, lambda: unanswered.holds_back
    held = threading.Event()

    def hold(*_: object, **__: object) -> None:
        held.set()
        threading.Event().wait()

    target, method = (
        (Lane, "connect") if phase is TransferState.CONNECTING else (TcpControl, "release")
    )
    pytest.MonkeyPatch().setattr(target, method, hold)
    return owner, held.is_set


def _bytes_in(buffer: Buffer) -> int:
    return int(np.count_nonzero(buffer.bytes))


if __name__ == "__main__":
    main()
