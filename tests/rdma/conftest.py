"""Tests that need an RDMA device; ``make test-rdma`` makes one where there is none.

Nothing here may import torch or vLLM: that takes a minute in the emulated machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tests.support.processes.leaks import nothing_left
from tests.support.transfers.cases import TransferCase, need_rdma_devices, rdma_case
from tests.support.transfers.engines import Pair, engine_pair
from tests.support.transfers.rdma_ends import Ends
from transfer.settings import TransferSettings
from transfer.transports.rdma.owner import RdmaAttachment


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


@pytest.fixture
def attachments(monkeypatch: pytest.MonkeyPatch) -> list[RdmaAttachment]:
    """What owners keep for readers, in the order in which it was made."""
    made: list[RdmaAttachment] = []
    make = RdmaAttachment.__init__

    def remember(self: RdmaAttachment, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(RdmaAttachment, "__init__", remember)
    return made


@pytest.fixture
def either(caplog: pytest.LogCaptureFixture) -> Iterator[Pair]:
    """A pair that may also use TCP, and says so in ``caplog``."""
    caplog.set_level(logging.INFO, "transfer")
    with engine_pair(
        settings=TransferSettings(
            transports=("rdma", "tcp"), rdma_device=os.environ.get("RDMA_DEVICE", "")
        )
    ) as pair:
        yield pair
