"""Measures on this machine's RDMA device, and prints one line for :mod:`bench.rdma.report`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

from bench.rdma.measurement import Measurement
from bench.rdma.perftest import Perftest
from bench.rdma.profile import BATON, rdma
from bench.transfer.cases import MIB
from bench.transfer.contestants import TwoProcesses
from bench.transfer.runner import measure
from bench.transfer.systems.baton import DEVICE_VARIABLE, TRANSPORT_VARIABLE
from transfer.errors import TransferError
from transfer.transports.rdma.rails import close_rails, open_rails


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rdma.measure", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each in each case")
    parser.add_argument("--mebibytes", type=int, default=128, help="moved by each sample")
    parser.add_argument("--limit-minutes", type=float, default=12.0)
    options = parser.parse_args()
    if options.rounds < 1 or options.mebibytes < 32:
        parser.error("--rounds must be 1 or more, --mebibytes 32 or more")

    try:
        rails = open_rails(os.environ.get(DEVICE_VARIABLE, ""), -1)
    except TransferError as error:
        parser.error(str(error))
    close_rails(rails)
    if len(rails) > 1:
        parser.error(f"{DEVICE_VARIABLE} names {len(rails)} devices; ib_read_bw uses one")
    (rail,) = rails
    profile = rdma(options.rounds, options.mebibytes * MIB)
    with tempfile.TemporaryDirectory(prefix="bench-rdma-") as scratch:
        ours = TwoProcesses(
            BATON,
            "baton",
            Path(sys.executable),
            profile.pool_bytes,
            Path(scratch) / "baton",
            environment={TRANSPORT_VARIABLE: "rdma", DEVICE_VARIABLE: str(rail)},
            streams_matter=True,
            pinned=True,
        )
        run = measure(
            profile,
            [ours, Perftest.on(rail)],
            limit_s=60 * options.limit_minutes,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    network = "RoCE" if rail.port.ethernet else "InfiniBand"
    device = f"{rail}, {network}, MTU {128 << rail.port.mtu}"
    print(Measurement(device, platform.release(), "RDMA_VM" in os.environ, run).to_json())


if __name__ == "__main__":
    main()
