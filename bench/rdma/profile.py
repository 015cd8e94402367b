"""What is read over RDMA, and the bar."""

from __future__ import annotations

from bench.transfer.cases import KIB, MIB, STREAMS, Case, Profile
from bench.transfer.reporting.bars import Bar, faster
from bench.transfer.reporting.results import Run

BATON = "baton rdma"
PERFTEST = "ib_read_bw"
BAR = 0.9

BLOCKS = (64 * KIB, 256 * KIB, MIB)


def rdma(rounds: int = 15, total_bytes: int = 128 * MIB) -> Profile:
    """For each block size a read of many blocks, and reads of one."""
    many = [Case(block, max(2, total_bytes // block), warm_up=0, reads=1) for block in BLOCKS]
    one = [Case(block, 1, STREAMS, warm_up=2, reads=10) for block in BLOCKS]
    return Profile("rdma", (*many, *one), rounds)


def judge(run: Run) -> list[Bar]:
    """The bar, for each block size of this run."""
    many = [case for case in run.cases if case.count > 1]
    bars = [faster(run, case, BATON, (PERFTEST,), BAR, digits=3) for case in many]
    return [bar for bar in bars if bar is not None]
