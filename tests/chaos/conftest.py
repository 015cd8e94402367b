"""One application for the whole suite: faults come one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos_app import ChaosApp, chaos_app

RESULTS = Path(os.environ.get("CHAOS_RESULTS", "build/chaos"))
"""Where rows of the table are kept; tests/support/chaos_table.py makes the table of them."""


@pytest.fixture(scope="session")
def ring(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosApp]:
    with chaos_app(tiny_model, tmp_path_factory.mktemp("chaos")) as running:
        yield running


@pytest.fixture(scope="session")
def results() -> Path:
    return RESULTS
