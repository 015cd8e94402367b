"""Right, wrong and broken requests mixed while known answers are asked for: ``make nuisances``."""

from __future__ import annotations

import os
import random
import sys
import time

import pytest

from tests.support.app_processes import Usage
from tests.support.chaos_app import MODEL, ChaosApp
from tests.support.load import Ended
from tests.support.nuisances import Nuisance, Nuisances

MINUTES = float(os.environ.get("NUISANCE_MINUTES", "10"))
SEED = int(os.environ.get("NUISANCE_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
RATE = 20.0
KNOWN_CLIENTS = 4
IN_FLIGHT = 12
"""With the known clients, below what the application lets in: nobody may be refused for it."""

WARM_UP_S = 60.0
"""Until every kind was seen some hundred times: what is kept after that is a leak."""

MEMORY_RATIO = 1.05
MEMORY_SLACK_BYTES = 8 << 20
"""One allocation more or less of the interpreter's, in processes of a few hundred MiB."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(int(MINUTES * 60) + 900),
]


def test_nobody_is_disturbed_by_what_others_send(ring: ChaosApp) -> None:
    """Known answers stay right, nothing is refused to them, nothing is kept of the rest."""
    load = ring.load(KNOWN_CLIENTS)
    others = Nuisances(
        ring.app.url, Nuisance(MODEL, random.Random(SEED)), rate=RATE, in_flight=IN_FLIGHT
    )
    load.start()
    others.start()
    try:
        time.sleep(WARM_UP_S)
        before = ring.processes.usage()
        time.sleep(max(0.0, MINUTES * 60 - WARM_UP_S))
    finally:
        others.stop()
        known = load.stop()
    statuses = dict(sorted(others.statuses.items()))
    sys.stderr.write(f"nuisances: seed {SEED}, {len(known)} known answers, {statuses}\n")
    assert not others.bad, (SEED, others.bad[:5])
    assert known
    assert not (wrong := [one for one in known if one.ended is not Ended.OK]), (SEED, wrong[:5])
    assert not (leaks := ring.leaks()), (SEED, leaks)
    assert not (grown := _grown(ring, before)), (SEED, grown)


def _grown(ring: ChaosApp, before: dict[str, Usage]) -> list[str]:
    """Processes that hold more memory than after the warm-up, in words."""
    return [
        f"{role}: {now.memory_bytes} bytes, {before[role].memory_bytes} before"
        for role, now in ring.processes.usage().items()
        if role in before
        and now.memory_bytes > before[role].memory_bytes * MEMORY_RATIO + MEMORY_SLACK_BYTES
    ]
