"""Tests that need an RDMA device; ``make test-rdma`` makes one where there is none.

Nothing here may import torch or vLLM: that takes a minute in the emulated machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.leaks import nothing_left
from tests.support.rdma_ends import Ends
from tests.support.transfer_cases import TransferCase, need_rdma_devices, rdma_case
from tests.support.transfer_engines import Pair, engine_pair


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    need_rdma_devices(1)
    with nothing_left(rdma=True):
        yield


@pytest.fixture
def case() -> TransferCase:
    """RDMA and nothing else."""
    return rdma_case()


@pytest.fixture
def pair(case: TransferCase) -> Iterator[Pair]:
    """An owner and a reader with 64 blocks of 4 KiB each."""
    with engine_pair(settings=case.settings()) as made:
        yield made


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Queue pairs between two registered buffers, without engines."""
    with Ends() as made:
        yield made
