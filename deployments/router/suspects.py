"""Which requests may be what kills engines, and what is risked with them. Pure.

A request that ends an engine by itself must not end all of them. Whoever was in an engine when it
died is a suspect: it may be tried once more, where no other suspect is being tried at that time,
so that the next death has one name. A request under which two engines died is condemned: nobody
works on it any more, nor on others of the same content, for some minutes.

Where an engine ends in a suspect's trial, that one is blamed: others that were there become
suspects, but none is condemned by that, and who was answering already is not even suspected. Where
several were on trial, because one took too long, nobody can say which it was: all that were there
are suspects, and none is condemned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from hashlib import blake2b
from typing import Any

from deployments.role import Role
from deployments.streams.generation import GenerationRequest

REMEMBERED_S = 300.0
"""How long a death counts."""

TRIAL_S = 30.0
"""A trial that takes longer keeps others from the engine no more. It goes on beside theirs."""

_DEATHS = 2
_MOST = 4096
"""Contents and engines that are remembered."""

_NAMES = {"request_id", "user", "kv_transfer_params", "stream", "stream_options", "session_id"}
"""Fields that say nothing of what an engine computes."""


class Standing(Enum):
    """What is known of a request's content."""

    CLEAR = "clear"
    SUSPECT = "suspect"
    CONDEMNED = "condemned"


class Case:
    """One request, of one prompt unless it bypasses prefill. Compared by identity."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request

    @cached_property
    def content(self) -> bytes:
        """Names what is asked for, whoever asks. Computed when first needed."""
        body = self._request.body.model_dump_json(exclude=_NAMES)
        ordered = json.dumps(json.loads(body), sort_keys=True)
        return blake2b(f"{self._request.method} {ordered}".encode(), digest_size=16).digest()


@dataclass(slots=True)
class _Record:
    """Deaths under one content: their numbers, with the role of each."""

    until: float
    deaths: dict[int, Role] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Death:
    number: int
    at: float
    on_trial: tuple[Case, ...]

    def is_named(self, case: Case) -> bool:
        """Whether it condemns whoever died of another one: it was alone on trial, or nobody was."""
        return self.on_trial in ((), (case,))

    def has_spared(self, case: Case) -> bool:
        """Whether another one is to blame for sure."""
        return len(self.on_trial) == 1 and not self.is_named(case)


@dataclass(slots=True)
class _Trial:
    case: Case
    role: Role
    engine: str
    since: float


class Suspects:
    """One router's memory of deaths. Not thread-safe.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[bytes, _Record] = {}
        self._deaths: dict[str, _Death] = {}
        self._trials: list[_Trial] = []
        self._number = 0

    def standing(self, case: Case) -> Standing:
        """What is known of a request before it is tried, or tried again."""
        record = self._record(case)
        if record is None:
            return Standing.CLEAR
        return Standing.CONDEMNED if len(record.deaths) >= _DEATHS else Standing.SUSPECT

    def is_risk(self, case: Case, role: Role) -> bool:
        """Whether the request must be tried apart from others in this role.

        What prefill survives decode may die of, but not the other way round: decode computes what
        prefill computed, and more.
        """
        record = self._record(case)
        if record is None:
            return False
        return role == "decode" or role in record.deaths.values()

    def has_ended_decode(self, case: Case) -> bool:
        """Whether it is suspected of what happened at decode."""
        record = self._record(case)
        return record is not None and "decode" in record.deaths.values()

    def died(
        self, case: Case, role: Role, engine: str, *, began: float, answering: bool = False
    ) -> Standing:
        """An engine died that had this request. Call it before :meth:`end_trial`.

        Args:
            began: when it was sent there; if the engine's death was known by then, it is not to
                blame.
            answering: it had given output there.
        """
        now = self._clock()
        death = self._death(engine, now)
        if began > death.at or (answering and death.has_spared(case)):
            return self.standing(case)
        record = self._record(case) or _Record(now)
        if not record.deaths or death.is_named(case):
            record.deaths[death.number] = role
        record.until = now + REMEMBERED_S
        self._records.pop(case.content, None)
        self._records[case.content] = record
        _forget_oldest(self._records)
        return self.standing(case)

    def alive(self, engine: str, began: float) -> None:
        """An engine answered what it was asked at ``began``: servers come back under their name."""
        death = self._deaths.get(engine)
        if death is not None and began > death.at:
            del self._deaths[engine]

    def passed(self, case: Case, role: Role) -> None:
        """The role's work is done and its engine alive: its deaths had another cause.

        Decode ends with everything computed, and clears the request of all.
        """
        record = self._record(case)
        if record is None:
            return
        record.deaths = {
            number: where
            for number, where in record.deaths.items()
            if role != "decode" and where != role
        }
        if not record.deaths:
            del self._records[case.content]

    def begin_trial(self, case: Case, role: Role, engine: str) -> bool:
        """Takes an engine for a suspect; False: another suspect is being tried there."""
        now = self._clock()
        if any(trial.engine == engine and now - trial.since < TRIAL_S for trial in self._trials):
            return False
        self._trials.append(_Trial(case, role, engine, now))
        return True

    def resume_trial(self, case: Case, role: Role) -> str | None:
        """The engine of a role that is taken for a suspect; it is sent there only now."""
        trial = self._trial(case, role)
        if trial is None:
            return None
        trial.since = self._clock()
        return trial.engine

    def end_trial(self, case: Case, role: Role) -> bool:
        """Its first output came, or it ended in another way; whether an engine was taken for it."""
        trial = self._trial(case, role)
        if trial is None:
            return False
        self._trials.remove(trial)
        return True

    # ------------------------------------------------------------------------------------------

    def _trial(self, case: Case, role: Role) -> _Trial | None:
        own = (trial for trial in self._trials if trial.case is case and trial.role == role)
        return next(own, None)

    def _record(self, case: Case) -> _Record | None:
        if not self._records:
            return None
        record = self._records.get(case.content)
        if record is not None and record.until <= self._clock():
            del self._records[case.content]
            return None
        return record

    def _death(self, engine: str, now: float) -> _Death:
        death = self._deaths.get(engine)
        if death is None:
            self._number += 1
            on_trial = tuple(trial.case for trial in self._trials if trial.engine == engine)
            death = _Death(self._number, now, on_trial)
            self._deaths[engine] = death
            _forget_oldest(self._deaths)
        return death


def _forget_oldest(items: dict[Any, Any]) -> None:
    if len(items) > _MOST:
        del items[next(iter(items))]
