"""Every fault at every phase where it makes sense: never wrong, never stuck, never leaked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos.app import ChaosApp
from tests.support.chaos.fault import Fault
from tests.support.chaos.faults import ALONE, FAULTS
from tests.support.chaos.run import run_alone, run_under_load

# The first test starts the application.
pytestmark = pytest.mark.timeout(600)


def _rows(faults: list[Fault]) -> list[Any]:
    """The full suite is run by hand (`make chaos`); the quick part with all other tests."""
    return [
        pytest.param(fault, id=fault.name, marks=() if fault.quick else pytest.mark.slow)
        for fault in faults
    ]


@pytest.mark.parametrize("fault", _rows(ALONE))
def test_without_other_load(ring: ChaosApp, results: Path, fault: Fault) -> None:
    row = run_alone(ring, fault).save(results)
    assert (row.wrong, row.stuck, row.leaked) == (0, 0, 0), row


@pytest.mark.parametrize("fault", _rows(FAULTS))
def test_under_load(ring: ChaosApp, results: Path, fault: Fault) -> None:
    row = run_under_load(ring, fault).save(results)
    assert (row.wrong, row.stuck, row.leaked) == (0, 0, 0), row
    # Unless the row says otherwise there is a healthy twin, or one that comes back in time.
    assert row.ok > 0 == row.failed, row
    assert not [note for note in row.notes if note.startswith("not as before")], row
