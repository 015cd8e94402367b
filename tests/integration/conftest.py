"""A real etcd, and sessions of discovery on it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import TTL_S, Session, admin
from tests.support.servers.vllm_server import RUNNING
from transfer.discovery import make_discovery
from transfer.discovery.base import Discovery


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows what the engines of a failed test said."""
    report = yield
    if report.failed:
        for server in RUNNING:
            report.sections.append((f"log of the engine at {server.url}", server.log_tail()))
    return report


@pytest.fixture(scope="module")
def shared_etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd(shared_etcd: EtcdServer) -> Iterator[EtcdServer]:
    """The module's etcd, emptied and running again after each test."""
    yield shared_etcd
    shared_etcd.resume()
    with admin(shared_etcd) as client:
        client.delete_prefix("/baton/")


@pytest.fixture
def session() -> Iterator[Session]:
    opened: list[Discovery] = []

    def make(server: EtcdServer, **more: Any) -> Discovery:
        config = {"kind": "etcd", "endpoints": [server.endpoint], "lease_ttl_s": TTL_S, **more}
        opened.append(make_discovery(config))
        return opened[-1]

    yield make
    for discovery in opened:
        discovery.close()
