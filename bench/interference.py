"""What moving bytes costs a model that computes in the same process.

A loop of matrix products on one thread, while 1 GB of 64 KiB blocks comes in from another process:
read by the transfer engine in the loop's own process, and, for comparison, by one in a third
process, which takes the same processors but not this interpreter's lock. ``make
bench-interference`` writes the report, in Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from bench.transfer.host import Machine, load
from bench.transfer.reporting.tables import load as load_text
from bench.transfer.reporting.tables import table
from transfer.discovery.static import StaticDiscovery
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import Offer
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan, WorkerRecord

BLOCK_BYTES = 64 << 10
BLOCKS = 2048
READS = 8
ALONE_S = 1.0
SIZE = 256
OWNER = PeerId("owner", 0)
SCHEMES = ("tcp", "shm")
HERE, ELSEWHERE = "in the same process", "in another process"


@dataclass
class Slowdown:
    """Of products while a reader reads; one entry per round.

    Attributes:
        reader: where it is.
        factors: how many times as long a product took as alone, just before.
        gb_per_s: what the reader got meanwhile.
    """

    scheme: str
    reader: str
    factors: list[float] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)


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
            owner.offer(Offer(handoff_id, fence, "secret", spans, 1, 60.0))
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
        plan = ReadPlan(local=local, remote=remote)

        def always(_: PeerInfo) -> ReadPlan:
            return plan

        handles = []
        for _ in range(READS):
            handoff_id = uuid.uuid4().hex
            self._pipe.send(handoff_id)
            proof = Credentials(handoff_id, "owner", self._pipe.recv(), "secret", "reader")
            handles.append(self._engine.submit_read(OWNER, proof, always, 60.0))

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


def measure(scheme: str, rounds: int) -> list[Slowdown]:
    """With the reader in this process and in another one, by turns."""
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

    def start_elsewhere() -> Callable[[], bool]:
        there_ours.send("go")
        there_ours.recv()
        return there_ours.poll

    begin = {HERE: here.start, ELSEWHERE: start_elsewhere}
    slower = [Slowdown(scheme, reader) for reader in begin]
    for number in range(rounds):
        # Every round begins with the other one.
        for one in slower if number % 2 == 0 else slower[::-1]:
            base = alone()
            each, spent = products(begin[one.reader]())
            if one.reader == ELSEWHERE:
                there_ours.recv()
            one.factors.append(each / base)
            one.gb_per_s.append(READS * BLOCKS * BLOCK_BYTES / spent / 1e9)
    here.close()
    there_ours.send("")
    for process in (there, owner, other_owner):
        process.join()
    return slower


def render(
    slower: Sequence[Slowdown],
    machine: Machine,
    load_before: tuple[float, float, float],
    load_after: tuple[float, float, float],
) -> str:
    """The report in Markdown."""
    rows = [
        [
            one.scheme,
            one.reader,
            f"**{statistics.median(one.factors):.2f}**",
            f"{min(one.factors):.2f} to {max(one.factors):.2f}",
            f"{statistics.median(one.gb_per_s):.2f}",
        ]
        for one in slower
    ]
    size = f"{READS * BLOCKS * BLOCK_BYTES / 1e9:.2f} GB"
    parts = [
        "# What reading costs a model in the same process",
        (
            f"`make bench-interference`, medians of {len(slower[0].factors)} interleaved rounds. "
            f"{machine.processor}, {machine.cores} cores, Linux {machine.kernel}, Python "
            f"{machine.python}, torch {torch.__version__}. Load of the machine: "
            f"{load_text(load_before)} before, {load_text(load_after)} after."
        ),
        (
            f"One thread multiplies matrices of {SIZE} x {SIZE}, first alone for {ALONE_S:g} s, "
            f"then while {size} in blocks of {BLOCK_BYTES >> 10} KiB comes from another process. "
            "The engine that reads is in the process of the products, or, for comparison, in a "
            "third one, which takes the same processors and memory but not this interpreter's lock."
        ),
        table(["transport", "reader", "a product takes times as long", "range", "GB/s"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.interference", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="Markdown file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    torch.set_num_threads(1)
    before = load()
    slower = [one for scheme in SCHEMES for one in measure(scheme, options.rounds)]
    report = render(slower, Machine.here(), before, load())
    print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report)


if __name__ == "__main__":
    main()
