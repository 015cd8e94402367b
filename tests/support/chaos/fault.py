"""What a fault of the chaos suite is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.chaos.app import ChaosApp
from tests.support.load.questions import Ended, Result

OUTAGE_S = 8.0
"""How long things are away that come back: longer than a lease."""


class Began:
    """What an injection tells of itself: when it began, by calling this, and what it saw.

    Attributes:
        at_s: when, monotonic.
        over_at_s: when the fault was seen to be over; None: that is for the load to show.
        own: of requests that the injection itself sent; that each ended as it should is checked
            there.
    """

    def __init__(self) -> None:
        self.at_s = time.monotonic()
        self.over_at_s: float | None = None
        self.own: list[Result] = []

    def __call__(self) -> None:
        self.at_s = time.monotonic()

    def over(self) -> None:
        self.over_at_s = time.monotonic()


Inject = Callable[[ChaosApp, Began], None]

ALWAYS_OK = frozenset({Ended.OK})


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table.

    Attributes:
        what: the fault.
        phase: where requests are when it happens.
        inject: does it, and heals what does not heal by itself.
        quick: in the subset that `make test` runs.
        ends: how requests of the load may end; anything else fails the row.
    """

    what: str
    phase: str
    inject: Inject
    quick: bool = False
    ends: frozenset[Ended] = ALWAYS_OK

    @property
    def name(self) -> str:
        return f"{self.what}, {self.phase}".replace(" ", "-")
