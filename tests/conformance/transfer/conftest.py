"""Every test here leaves no descriptor and no thread behind, and runs over every transport."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.transfer_cases import TransferCase, why_no_process_memory
from tests.support.transfer_engines import Pair, engine_pair, wait_until

CASES = ["tcp", "shm"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> TransferCase:
    """The transport under test."""
    if request.param == "shm" and (why := why_no_process_memory()):
        pytest.skip(why)
    return TransferCase(request.param, {"transports": [request.param]})


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    descriptors, threads = len(_descriptors()), set(threading.enumerate())
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    assert wait_until(lambda: len(_descriptors()) <= descriptors), _descriptors()


@pytest.fixture
def pair(case: TransferCase) -> Iterator[Pair]:
    """An owner and a reader with 64 blocks of 4 KiB each."""
    with engine_pair(settings=case.settings()) as made:
        yield made
