"""Half an hour of mixed traffic with a random fault every 20 seconds: ``make soak``."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.support.chaos.app import ChaosApp
from tests.support.chaos.fault import ALWAYS_OK, Began, Fault
from tests.support.chaos.faults import FAULTS
from tests.support.load.questions import Ended, Result

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
FAULT_EVERY_S = 20.0
SURVIVED = [fault for fault in FAULTS if fault.ends == ALWAYS_OK]
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(int(MINUTES * 60) + 900),
]


def test_soak(ring: ChaosApp) -> None:
    """Ends with the same zeros as every single fault."""
    chance = random.Random(SEED)
    load = ring.load()
    load.start()
    end_s = time.monotonic() + MINUTES * 60
    injected: Counter[str] = Counter()
    try:
        while time.monotonic() < end_s:
            due_s = time.monotonic() + FAULT_EVERY_S
            fault = chance.choice(SURVIVED)
            _say(f"{fault.name} ({_counts(load.results())})")
            injected[fault.name] += _inject(ring, fault)
            ring.wait_complete()
            time.sleep(max(0.0, due_s - time.monotonic()))
    finally:
        ring.points.clear()
        results = load.stop()
    _say(f"{sum(injected.values())} faults, seed {SEED}: {_counts(results)}")
    ring.wait_complete()
    bad = [one.detail for one in results if one.ended not in (Ended.OK, Ended.REFUSED)]
    assert not bad, (SEED, bad[:5])
    assert not (leaks := ring.leaks()), (SEED, leaks)
    assert injected


def _inject(ring: ChaosApp, fault: Fault) -> bool:
    """Whether it could be: replacements may still be missing where it wanted to strike."""
    try:
        fault.inject(ring, Began())
    except (LookupError, TimeoutError) as error:
        _say(f"  not injected: {error}")
        return False
    finally:
        ring.points.clear()
    return True


def _counts(results: Sequence[Result]) -> str:
    counts = Counter(one.ended for one in results)
    return ", ".join(f"{count} {ended}" for ended, count in sorted(counts.items()))


def _say(line: str) -> None:
    sys.stderr.write(f"soak: {line}\n")
    sys.stderr.flush()
