"""Runs one fault under load and measures what clients and processes saw of it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.support.chaos.app import ChaosApp
from tests.support.chaos.fault import Began, Fault
from tests.support.load.questions import Ended, Result

BEFORE_RESULTS = 12
AFTER_RESULTS = 18
BEFORE_S = 20.0
AFTER_S = 100.0
SLOW = 2.0
"""So many times the slowest answer before the fault, and a request counts as degraded."""


@dataclass
class Row:
    """One row of the table.

    Attributes:
        requests: that ended while the row ran, those before the fault included.
        ok: answered rightly; where the client leaves, all was free in time.
        degraded: of these, slower than twice the slowest before the fault.
        refused: ended with a clear error; or broke, where the row allows that.
        wrong: another answer than one engine's.
        stuck: no end in 60 s; or broke, where the row does not allow that.
        leaked: things still held when nothing was asked any more.
        recovery_s: from the fault to the end of the last request that it slowed down or failed.
        failed: requests of the load that ended in a way that the row does not allow.
        notes: what the counts do not say, for whoever looks into it.
    """

    fault: str
    phase: str
    requests: int = 0
    ok: int = 0
    degraded: int = 0
    refused: int = 0
    wrong: int = 0
    stuck: int = 0
    leaked: int = 0
    recovery_s: float = 0.0
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    def judge(self, fault: Fault, began: Began, load: Sequence[Result] = ()) -> None:
        """Count in what the load saw, and the requests that the fault itself sent."""
        results = [*load, *began.own]
        before = [one.seconds for one in results if one.ended_s < began.at_s]
        slow_s = SLOW * max(before, default=math.inf)
        troubled = [
            one
            for one in results
            if one.ended_s >= began.at_s and (one.ended is not Ended.OK or one.seconds > slow_s)
        ]
        counts = Counter(one.ended for one in results)
        self.requests = len(results)
        self.ok, self.wrong = counts[Ended.OK], counts[Ended.WRONG]
        self.refused, self.stuck = counts[Ended.REFUSED], counts[Ended.STUCK]
        if Ended.BROKEN in fault.ends:
            self.refused += counts[Ended.BROKEN]
        else:
            self.stuck += counts[Ended.BROKEN]
        self.degraded = sum(one.ended is Ended.OK for one in troubled)
        self.failed = sum(one.ended not in fault.ends for one in load)
        self.recovery_s = max((one.ended_s - began.at_s for one in troubled), default=0.0)
        self.notes += sorted({one.detail[:300] for one in results if one.ended is not Ended.OK})

    def save(self, folder: Path) -> Self:
        """Keep it for the table."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.fault}, {self.phase}".replace(" ", "-")
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1))
        return self


def run_under_load(ring: ChaosApp, fault: Fault) -> Row:
    """Ask, inject, go on asking until answers come as before, and look at what is left."""
    row = Row(fault.what, fault.phase)
    ring.wait_complete()
    load, began = ring.load(), Began()
    load.start()
    try:
        if not load.wait(lambda done: len(done) >= BEFORE_RESULTS, BEFORE_S):
            row.notes.append("slow before the fault")
        fault.inject(ring, began)
        healed_s = time.monotonic()

        def recovered(done: list[Result]) -> bool:
            after = [one for one in done if one.began_s > healed_s]
            return len(after) >= AFTER_RESULTS and all(
                one.ended is Ended.OK for one in after[-AFTER_RESULTS:]
            )

        if not load.wait(recovered, AFTER_S):
            row.notes.append(f"not as before {AFTER_S:.0f} s after the fault")
    finally:
        ring.points.clear()
        results = load.stop()
    row.judge(fault, began, results)
    ring.wait_complete()
    return _with_leaks(row, ring)


def run_alone(ring: ChaosApp, fault: Fault) -> Row:
    """Inject without load: the fault itself asks, and checks that all is free in time."""
    row = Row(fault.what, fault.phase, requests=1, ok=1)
    ring.wait_complete()
    began = Began()
    try:
        fault.inject(ring, began)
    finally:
        ring.points.clear()
    if began.own:
        row.judge(fault, began)
    else:
        row.recovery_s = (began.over_at_s or time.monotonic()) - began.at_s
    return _with_leaks(row, ring)


def _with_leaks(row: Row, ring: ChaosApp) -> Row:
    leaks = ring.leaks()
    row.leaked = len(leaks)
    row.notes += leaks
    return row
