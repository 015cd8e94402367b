"""RDMA beside perftest's ``ib_read_bw``, on the same device and link, one after the other by turns.

Both move scattered blocks of one size out of another process's memory with one-sided reads; both
keep two connections busy. Without an RDMA device, run it in the virtual machine of the tests::

    tests/rdma/run-in-vm.sh .venv/bin/python -m bench.rdma_guest

Prints Markdown: medians of MB/s (10**6 bytes) for several block sizes, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tests.support.owner_process import OwnerReport, owner_process
from tests.support.transfer_engines import Buffer, Directory, make_engine
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferState
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.transports.rdma.device import open_rails
from transfer.types import Planner, ReadPlan

PERFTEST = "ib_read_bw"
QUEUE_PAIRS = 2
BLOCKS_BYTES = (65_536, 262_144, 1 << 20)


class Ours:
    """An owner in another process, and a reader in this one that reads all its blocks."""

    def __init__(self, engine: TransferEngine, local: Buffer) -> None:
        self.engine = engine
        self.local = local
        self.number = 0
        self.random = np.random.default_rng(0)

    def megabytes_per_second(self, report: OwnerReport) -> float:
        """One read, in random order on both sides."""
        count, block_bytes = self.local.num_blocks, self.local.block_bytes
        blocks = self.random.permutation(count)
        remote = block_spans(report.base, block_bytes, block_bytes, blocks)
        plan = ReadPlan(self.local.spans(self.random.permutation(count)), remote)
        credentials = report.credentials(self.number)
        self.number += 1
        later = range(self.number, len(report.handoff_ids))
        self.engine.submit_renew(report.record.peer, list(map(report.credentials, later)))
        begun = time.perf_counter()
        handle = self.engine.submit_read(report.record.peer, credentials, always(plan), 60)
        handle.wait()
        passed = time.perf_counter() - begun
        if handle.state is not TransferState.DONE:
            raise RuntimeError(f"the read failed: {handle.error}")
        return self.local.bytes.nbytes / passed / 1e6


@contextmanager
def both_ends(
    device: str, count: int, block_bytes: int, reads: int
) -> Iterator[tuple[Ours, OwnerReport]]:
    """A connected reader, and the owner's report."""
    settings = TransferSettings(
        transports=("rdma",), rdma_device=device, streams_per_peer=QUEUE_PAIRS
    )
    directory, local = Directory(), Buffer(count, block_bytes, fill=0)
    engine = make_engine(directory, "reader", settings=settings)
    engine.register(local.address, local.bytes.nbytes)
    forced = {"transports": ["rdma"], "rdma_device": device}
    owner = owner_process("owner-1", count, block_bytes, offers=reads, settings=forced)
    with engine, owner as (_, report):
        directory.publish(report.record)
        ours = Ours(engine, local)
        ours.megabytes_per_second(report)  # connects
        yield ours, report


def always(plan: ReadPlan) -> Planner:
    """A planner that has made up its mind."""
    return lambda _: plan


class Perftest:
    """``ib_read_bw`` from this machine to itself."""

    def __init__(self, device: str, total_bytes: int) -> None:
        rail = open_rails(device, -1)[0]
        self.command = [
            PERFTEST,
            f"--ib-dev={rail.device.name}",
            f"--ib-port={rail.port.number}",
            f"--gid-index={rail.gid.index}",
            f"--qp={QUEUE_PAIRS}",
            f"--mtu={128 << rail.port.mtu}",
            "--report_gbits",
        ]
        rail.device.close()
        self.total_bytes = total_bytes

    def megabytes_per_second(self, block_bytes: int) -> float:
        """One run over as many bytes as one of our reads."""
        iterations = max(5, self.total_bytes // block_bytes // QUEUE_PAIRS)
        command = [*self.command, f"--size={block_bytes}", f"--iters={iterations}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
            time.sleep(3)
            client = subprocess.run(
                [*command, "127.0.0.1"], capture_output=True, text=True, timeout=120, check=False
            )
            server.kill()
        # bytes, iterations, peak, average Gb/s, messages per second
        found = re.search(rf"^\s*{block_bytes}\s+\d+\s+\S+\s+(\S+)\s", client.stdout, re.M)
        if found is None:
            raise RuntimeError(f"{PERFTEST} failed: {client.stdout[-500:]}{client.stderr[-500:]}")
        return float(found[1]) * 1000 / 8


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=os.environ.get("RDMA_DEVICE", ""))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--mebibytes", type=int, default=128, help="moved by each read and each run"
    )
    options = parser.parse_args()
    if shutil.which(PERFTEST) is None:
        parser.error(f"{PERFTEST} is missing: it is in the package perftest")
    total_bytes = options.mebibytes << 20
    theirs = Perftest(options.device, total_bytes)
    print(f"{options.rounds} rounds of {options.mebibytes} MiB, load {os.getloadavg()[0]:.1f}\n")
    print(f"| block | Baton, MB/s | {PERFTEST}, MB/s | ratio |")
    print("| --- | --- | --- | --- |")
    for block_bytes in BLOCKS_BYTES:
        own, other = [], []
        count = total_bytes // block_bytes
        with both_ends(options.device, count, block_bytes, 2 * options.rounds + 1) as (
            ours,
            report,
        ):
            for _ in range(options.rounds):
                own.append(ours.megabytes_per_second(report))
                other.append(theirs.megabytes_per_second(block_bytes))
                own.append(ours.megabytes_per_second(report))
        medians = statistics.median(own), statistics.median(other)
        print(
            f"| {block_bytes >> 10} KiB | {medians[0]:.1f} | {medians[1]:.1f} | "
            f"{medians[0] / medians[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
