"""Right, wrong and broken requests mixed while known answers are asked for: ``make nuisances``."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos.app import MODEL, ChaosApp, chaos_app
from tests.support.load.nuisances import Nuisance, Nuisances
from tests.support.load.questions import Ended
from tests.support.processes.app_processes import Usage

MINUTES = float(os.environ.get("NUISANCE_MINUTES", "10"))
SEED = int(os.environ.get("NUISANCE_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
RATE = 20.0
KNOWN_CLIENTS = 4
IN_FLIGHT = 48
MAX_REQUESTS = 64
"""More than are in flight, with the known clients': nobody may be refused for it."""

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


@pytest.fixture
def roomy(tiny_model: Path, tmp_path: Path) -> Iterator[ChaosApp]:
    with chaos_app(tiny_model, tmp_path, max_requests=MAX_REQUESTS) as running:
        yield running


def test_nobody_is_disturbed_by_what_others_send(roomy: ChaosApp) -> None:
    """Known answers stay right, nothing is refused to them, nothing is kept of the rest."""
    load = roomy.load(KNOWN_CLIENTS)
    others = Nuisances(
        roomy.app.url, Nuisance(MODEL, random.Random(SEED)), rate=RATE, in_flight=IN_FLIGHT
    )
    load.start()
    others.start()
    try:
        time.sleep(WARM_UP_S)
        before = roomy.processes.usage()
        usages = [before]
        ends_s = time.monotonic() + max(0.0, MINUTES * 60 - WARM_UP_S)
        while (left_s := ends_s - time.monotonic()) > 0:
            time.sleep(min(60.0, left_s))
            usages.append(roomy.processes.usage())
    finally:
        others.stop()
        known = load.stop()
    statuses = dict(sorted(others.statuses.items()))
    rate = sum(statuses.values()) / (MINUTES * 60)
    sys.stderr.write(
        f"nuisances: seed {SEED}, {len(known)} known answers, {rate:.1f} a second: {statuses}\n"
    )
    for role in before:
        held = [usage[role].memory_bytes >> 20 for usage in usages if role in usage]
        sys.stderr.write(f"nuisances: MiB of {role}, minute by minute: {held}\n")
    assert rate > 0.95 * RATE, "this machine did not keep up: no proof of anything"
    assert not others.bad, (SEED, others.bad[:5])
    assert known
    assert not (wrong := [one for one in known if one.ended is not Ended.OK]), (SEED, wrong[:5])
    assert not (leaks := roomy.leaks()), (SEED, leaks)
    assert not (grown := _grown(roomy, before)), (SEED, grown)


def _grown(app: ChaosApp, before: dict[str, Usage]) -> list[str]:
    """Processes that hold more memory than after the warm-up, in words."""
    return [
        f"{role}: {now.memory_bytes} bytes, {before[role].memory_bytes} before"
        for role, now in app.processes.usage().items()
        if role in before
        and now.memory_bytes > before[role].memory_bytes * MEMORY_RATIO + MEMORY_SLACK_BYTES
    ]
