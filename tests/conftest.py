"""What every test gets: a marker and a time limit by folder, and no sockets in unit tests."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.models.tiny_model import make_tiny_model

TESTS = Path(__file__).resolve().parent

TIMEOUT_S = {
    "unit": 20,
    "conformance": 60,
    "rdma": 120,
    "integration": 120,
    "e2e": 300,
    "chaos": 180,
}
"""Folder -> limit for one test, in the order in which the folders run: cheap ones first."""

SLOWNESS = 3 if os.environ.get("RDMA_VM") else 1
"""Everything takes its time in the emulated machine of tests/rdma."""

# Models come from disk; a test that reaches for a hub should fail at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM compiles parts of its sampler (logprobs) the first time they are used, even when told to run
# eagerly: that takes 17 s on CPU, and a C++ compiler, without which the engine dies.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _folder(item: pytest.Item) -> str | None:
    parts = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ()
    return parts[0] if parts and parts[0] in TIMEOUT_S else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by folder and runs the folders in order."""
    order = {folder: rank for rank, folder in enumerate(TIMEOUT_S)}
    for item in items:
        folder = _folder(item)
        if folder is None:
            continue
        item.add_marker(folder)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S[folder] * SLOWNESS))
    items.sort(key=lambda item: order.get(_folder(item) or "", len(order)))


@pytest.fixture(autouse=True)
def _no_sockets_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuses ``connect`` and ``bind``; socketpairs, which event loops need, stay allowed."""
    if request.node.get_closest_marker("unit") is None:
        return

    def refuse(_self: socket.socket, address: Any) -> NoReturn:
        pytest.fail(f"a unit test used a socket ({address!r}): move it to tests/integration")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model; made once a run."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))
