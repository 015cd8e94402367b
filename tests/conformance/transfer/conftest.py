"""Every test here leaves no descriptor and no thread behind, and runs over every transport."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority, TlsFiles
from tests.support.transfer_cases import TransferCase, rdma_case, why_no_process_memory
from tests.support.transfer_engines import Pair, engine_pair, wait_until
from transfer.transports.rdma.verbs import device_names

CASES = ["tcp", "tcp+tls", "shm", *(["rdma"] if device_names() else [])]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Issues the certificates that engines of these tests accept."""
    return Authority(tmp_path_factory.mktemp("certificates"), "ca")


@pytest.fixture(scope="session")
def tls(authority: Authority) -> TlsFiles:
    """A certificate for loopback."""
    return authority.issue("worker", "127.0.0.1", "localhost")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> TransferCase:
    """The transport under test."""
    if request.param == "shm" and (why := why_no_process_memory()):
        pytest.skip(why)
    if request.param == "rdma":
        return rdma_case()
    scheme, _, with_tls = request.param.partition("+")
    if with_tls:
        tls: TlsFiles = request.getfixturevalue("tls")
        return TransferCase(request.param, {"transports": [scheme], **tls.settings()})
    return TransferCase(request.param, {"transports": [scheme]})


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
