"""What moving bytes costs a model that computes in the same process.

A loop of matrix products on one thread, while 1 GB of 64 KiB blocks comes in from another process:
read by the transfer engine in the loop's own process, and, for comparison, by one in a third
process, which takes the same processors but not this interpreter's lock::

    python -m bench.interference
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch

from transfer.discovery.static import StaticDiscovery
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import Offer
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.types import Credentials, PeerId, ReadPlan, WorkerRecord

BLOCK_BYTES = 64 << 10
BLOCKS = 2048
READS = 8
ROUNDS = 7
ALONE_S = 1.0
SIZE = 256
OWNER = PeerId("owner", 0)


def engine(
    peer: PeerId, scheme: str, pool: np.ndarray, known: list[WorkerRecord]
) -> TransferEngine:
    """With ``pool`` registered; not started."""
    made = TransferEngine(
        peer=peer,
        incarnation=peer.engine_id,
        role="bench",
        tp_size=1,
        layout_hash="bench",
        layout=b"",
        discovery=StaticDiscovery(known),
        settings=TransferSettings(transports=(scheme,)),
    )
    made.register(pool.ctypes.data, pool.nbytes)
    return made


def own(scheme: str, pipe: Connection) -> None:
    """The owner's process: offers all its blocks, as often as asked."""
    pool = np.ones(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
    with engine(OWNER, scheme, pool, []) as owner:
        pipe.send((owner.addresses, pool.ctypes.data))
        spans = block_spans(pool.ctypes.data, BLOCK_BYTES, BLOCK_BYTES, range(BLOCKS))
        for fence in range(1 << 30):
            handoff_id = pipe.recv()
            if not handoff_id:
                return
            owner.take_ended()
            owner.offer(Offer(handoff_id, fence, "token", spans, 1, 60.0, BLOCKS))
            pipe.send(fence)


class Reader:
    """Reads 1 GB on a thread of its engine."""

    def __init__(self, scheme: str, owner: Connection) -> None:
        self._pipe = owner
        addresses, self._base = owner.recv()
        self._pool = np.zeros(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
        record = WorkerRecord(OWNER, "owner", "bench", 1, addresses, "bench", started_at_s=0.0)
        self._engine = engine(PeerId("reader", 0), scheme, self._pool, [record])
        self._engine.start()
        self._order = np.random.default_rng(1).permutation(BLOCKS)

    def start(self) -> Callable[[], bool]:
        """Begins; what is returned says whether it is over."""
        local, remote = (
            block_spans(base, BLOCK_BYTES, BLOCK_BYTES, ids)
            for base, ids in ((self._pool.ctypes.data, range(BLOCKS)), (self._base, self._order))
        )
        handles = []
        for _ in range(READS):
            handoff_id = uuid.uuid4().hex
            self._pipe.send(handoff_id)
            proof = Credentials(handoff_id, "owner", self._pipe.recv(), "token", "reader")
            plan = ReadPlan(local=local, remote=remote)
            handles.append(self._engine.submit_read(OWNER, proof, lambda _, plan=plan: plan, 60.0))

        def over() -> bool:
            for handle in handles:
                if handle.error is not None:
                    raise handle.error
            return all(handle.state.is_final for handle in handles)

        return over

    def close(self) -> None:
        self._engine.close()
        self._pipe.send("")


def read_elsewhere(scheme: str, owner: Connection, pipe: Connection) -> None:
    """The third process: a reader that is told when to read."""
    reader = Reader(scheme, owner)
    pipe.send("ready")
    while pipe.recv():
        over = reader.start()
        pipe.send("started")
        while not over():
            time.sleep(0.001)
        pipe.send("over")
    reader.close()


def products(until: Callable[[], bool]) -> tuple[float, float]:
    """Multiplies until it is time; seconds of one product, and seconds altogether."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    began, count = time.monotonic(), 0
    while not until():
        torch.mm(a, b)
        count += 1
    spent = time.monotonic() - began
    return spent / count, spent


def alone() -> float:
    until = time.monotonic() + ALONE_S
    return products(lambda: time.monotonic() >= until)[0]


def measure(scheme: str) -> None:
    """Prints one row for the reader in this process and one for that in another."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own, args=(scheme, theirs), daemon=True)
    owner.start()
    other_ours, other_theirs = context.Pipe()
    there_ours, there_theirs = context.Pipe()
    other_owner = context.Process(target=own, args=(scheme, other_theirs), daemon=True)
    other_owner.start()
    there = context.Process(
        target=read_elsewhere, args=(scheme, other_ours, there_theirs), daemon=True
    )
    there.start()
    here = Reader(scheme, ours)
    there_ours.recv()
    slower: dict[str, list[float]] = {"in the same process": [], "in another process": []}
    rates: dict[str, list[float]] = {name: [] for name in slower}
    for _ in range(ROUNDS):
        base = alone()
        each, spent = products(here.start())
        slower["in the same process"].append(each / base)
        rates["in the same process"].append(READS * BLOCKS * BLOCK_BYTES / spent / 1e9)
        base = alone()
        there_ours.send("go")
        there_ours.recv()
        each, spent = products(there_ours.poll)
        there_ours.recv()
        slower["in another process"].append(each / base)
        rates["in another process"].append(READS * BLOCKS * BLOCK_BYTES / spent / 1e9)
    for name, factors in slower.items():
        print(
            f"| {scheme} | {name} | {statistics.median(factors):.2f} | "
            f"{min(factors):.2f} to {max(factors):.2f} | {statistics.median(rates[name]):.2f} |"
        )
    here.close()
    there_ours.send("")
    for process in (there, owner, other_owner):
        process.join()


def main() -> None:
    torch.set_num_threads(1)
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, load before {load}; medians of "
        f"{ROUNDS} rounds\n"
    )
    print("| transport | reader | a product takes times as long | range | GB/s |")
    print("| --- | --- | --- | --- | --- |")
    for scheme in ("tcp", "shm"):
        measure(scheme)


if __name__ == "__main__":
    main()
