"""Every test here runs over every transport and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes.leaks import nothing_left
from tests.support.servers.certificates import Authority, TlsFiles
from tests.support.transfers.cases import (
    TransferCase,
    need_rdma_devices,
    rdma_case,
    why_no_process_memory,
)
from tests.support.transfers.engines import Pair, engine_pair

CASES = ["tcp", "tcp+tls", "shm", "rdma"]


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


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    rdma = callspec is not None and callspec.params.get("case") == "rdma"
    if rdma:
        need_rdma_devices(1)
    with nothing_left(rdma=rdma):
        yield


@pytest.fixture
def pair(case: TransferCase) -> Iterator[Pair]:
    """An owner and a reader with 64 blocks of 4 KiB each."""
    with engine_pair(settings=case.settings()) as made:
        yield made
