"""Has suspects tried one at a time on an engine; see :mod:`deployments.router.suspects`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

from deployments.errors import Condemned, NoReplica
from deployments.role import ROLES, Role
from deployments.router.replica_client import ReplicaClient
from deployments.router.suspects import TRIAL_S, Case, Standing, Suspects

_TO_RISK_ONE = 2


class Trials:
    """The queues of suspects before the engines of each role. All from one event loop.

    Args:
        client: calls replicas.
        clock: seconds that only go forward.

    Attributes:
        suspects: who has to wait here.
    """

    def __init__(self, client: ReplicaClient, clock: Callable[[], float]) -> None:
        self.suspects = Suspects(clock)
        self._client = client
        self._lines: dict[Role, asyncio.Lock] = {role: asyncio.Lock() for role in ROLES}
        self._in_line: dict[Role, int] = dict.fromkeys(ROLES, 0)
        self._ended = asyncio.Event()
        # That a role had nobody but these, and when that was.
        self._nobody: dict[Role, tuple[frozenset[str], float]] = {}
        self._clock = clock

    async def replica_for(
        self,
        case: Case,
        role: Role,
        exclude: frozenset[str],
        before_waiting: Callable[[], None] = lambda: None,
    ) -> str | None:
        """The one replica that a request may go to; None: whichever is free.

        A suspect waits, first come first served, for a replica that has just said that it is well
        and on which no other one is being tried. It has it until :meth:`over`; it must not ask for
        another one of that role before.

        Args:
            before_waiting: called before a suspect waits for others, perhaps more than once.

        Raises:
            Condemned: nobody shall work on it; perhaps since it waited here.
            NoReplica: none took the question in time.
            ReplicaLost: the one that was asked is not well; the request was not there.
        """
        if not self.suspects.is_risk(case, role):
            return None
        if self._in_line[role]:
            before_waiting()
        self._in_line[role] += 1
        since = self._clock()
        try:
            async with self._lines[role]:
                self._require_somebody(role, exclude, since)
                return await self._first_in_line(case, role, exclude, before_waiting)
        except NoReplica:
            self._nobody[role] = (exclude, self._clock())
            raise
        finally:
            self._in_line[role] -= 1

    async def may_leave_prefill(self, case: Case) -> bool:
        """Whether decode may compute a prompt that no prefill replica is there for.

        A suspect only where it would not be the end of the last decode replica.
        """
        if self.suspects.standing(case) is Standing.CLEAR:
            return True
        return await self._client.replicas("decode") >= _TO_RISK_ONE

    def over(self, case: Case, role: Role) -> None:
        """A request's trial has ended, in whichever way; without one, nothing happens."""
        if self.suspects.end_trial(case, role):
            self._ended.set()
            self._ended = asyncio.Event()

    # ------------------------------------------------------------------------------------------

    def _require_somebody(self, role: Role, exclude: frozenset[str], since: float) -> None:
        """One of those in line finds out for all that nobody is there."""
        others, at = self._nobody.get(role, (exclude, -math.inf))
        if at >= since and others <= exclude:
            raise NoReplica(role, at - since)

    async def _first_in_line(
        self, case: Case, role: Role, exclude: frozenset[str], before_waiting: Callable[[], None]
    ) -> str | None:
        while self.suspects.is_risk(case, role):
            if self.suspects.standing(case) is Standing.CONDEMNED:
                raise Condemned
            asked = self._clock()
            replica_id = await self._client.well(role, exclude)
            self.suspects.alive(replica_id, asked)
            if self.suspects.begin_trial(case, role, replica_id):
                return replica_id
            before_waiting()
            ended = self._ended
            with suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_S):
                    await ended.wait()
        return None
