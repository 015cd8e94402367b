"""One application for the whole suite: faults come one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos.app import ChaosApp, chaos_app
from tests.support.servers.certificates import Authority

RESULTS = Path(os.environ.get("CHAOS_RESULTS", "build/chaos"))
"""Where rows of the table are kept; tests/support/chaos/table.py makes the table of them."""

TLS = os.environ.get("CHAOS_TLS") == "1"
"""Whether workers speak TLS with each other. Not in one session: two applications are too much for
a small machine."""


@pytest.fixture(scope="session")
def ring(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosApp]:
    folder = tmp_path_factory.mktemp("chaos")
    files = (
        Authority(folder, "ca").issue("worker", "127.0.0.1", "127.0.0.2").settings() if TLS else {}
    )
    with chaos_app(tiny_model, folder, files) as running:
        yield running


@pytest.fixture(scope="session")
def results() -> Path:
    return RESULTS / "tls" if TLS else RESULTS
