"""Every test here leaves no descriptor and no thread behind, and runs over every transport."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.transfer_engines import Pair, engine_pair, wait_until
from transfer.settings import TransferSettings
from transfer.transports.registry import Transports

SCHEMES = [transport.scheme for transport in Transports(TransferSettings()).all()]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    """The transport under test, by its scheme."""
    return str(request.param)


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    descriptors, threads = len(_descriptors()), set(threading.enumerate())
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    assert wait_until(lambda: len(_descriptors()) <= descriptors), _descriptors()


@pytest.fixture
def pair(scheme: str) -> Iterator[Pair]:
    """An owner and a reader with 64 blocks of 4 KiB each."""
    with engine_pair() as made:
        assert all(address.startswith(scheme) for address in made.owner.addresses)
        yield made
