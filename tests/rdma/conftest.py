"""Tests that need an RDMA device; ``make test-rdma`` makes one where there is none.

Nothing here may import torch or vLLM: that takes a minute in the emulated machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.rdma_ends import Ends
from tests.support.transfer_cases import TransferCase, rdma_case
from tests.support.transfer_engines import Pair, engine_pair
from transfer.transports.rdma.verbs import device_names


@pytest.fixture(autouse=True)
def _needs_a_device() -> None:
    if not device_names():
        pytest.skip("no RDMA device; make test-rdma runs this in a virtual machine that has one")


def _held() -> dict[str, int]:
    """Queue pairs, registered regions and the like that exist, over all devices."""
    tool = shutil.which("rdma", path="/usr/bin:/usr/sbin:/sbin")
    if tool is None:
        return {}
    shown = subprocess.run([tool, "-j", "resource", "show"], capture_output=True, check=True)
    held: dict[str, int] = {}
    for device in json.loads(shown.stdout or "[]"):
        for kind in ("pd", "cq", "qp", "mr", "ctx"):
            held[kind] = held.get(kind, 0) + int(device.get(kind, 0))
    return held


@pytest.fixture(autouse=True)
def _nothing_stays_registered(_needs_a_device: None) -> Iterator[None]:
    before = _held()
    yield
    assert _held() == before


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
