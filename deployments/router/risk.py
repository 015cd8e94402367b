"""What is risked with one prompt; see :mod:`deployments.router.suspects`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from deployments.errors import NoReplica, ReplicaLost
from deployments.role import Role
from deployments.router.request_log import warn
from deployments.router.request_state import Unwanted
from deployments.router.router_event import RouterEvent
from deployments.router.suspects import Case, Standing
from deployments.router.trials import Trials
from deployments.streams.generation import GenerationRequest
from deployments.streams.stream_errors import ENDS_ENGINES


class Risk:
    """One prompt's dealings with what is known of deaths.

    Args:
        request: of the prompt, as replicas know it.
        trials: of all requests.
        count: told of every :class:`RouterEvent`.
    """

    def __init__(
        self, request: GenerationRequest, trials: Trials, count: Callable[[RouterEvent], None]
    ) -> None:
        self._request = request
        self._trials = trials
        self._count = count
        self._case = Case(request)

    @property
    def standing(self) -> Standing:
        """What is known of the prompt now."""
        return self._trials.suspects.standing(self._case)

    def condemned(self) -> Unwanted:
        """Nobody shall work on it: counts that, and says what it is answered with."""
        self._count(RouterEvent.CONDEMNED)
        return Unwanted(ENDS_ENGINES)

    async def replica_for(
        self,
        role: Role,
        exclude: frozenset[str],
        before_waiting: Callable[[], None] = lambda: None,
    ) -> str | None:
        """The replica that a suspect is tried on; None: the prompt is none.

        Args:
            before_waiting: called before it waits for others, perhaps more than once.

        Raises:
            Condemned, NoReplica, ReplicaLost: see :meth:`Trials.replica_for`.
        """
        taken = self._trials.suspects.resume_trial(self._case, role)
        only = taken or await self._trials.replica_for(self._case, role, exclude, before_waiting)
        if only is not None and taken is None:
            warn(self._request, f"is tried apart from others on {role} replica {only}")
            self._count(RouterEvent.SUSPECT_TRIED)
        return only

    async def place_at_decode(self, exclude: frozenset[str]) -> None:
        """Has a suspect of what happened at decode wait for its trial there before prefill.

        Afterwards it would wait with pinned blocks.

        Raises:
            Condemned: nobody shall work on it.
        """
        if self._trials.suspects.has_ended_decode(self._case):
            # Whether any is there is seen when decode is called.
            with suppress(NoReplica, ReplicaLost):
                await self.replica_for("decode", exclude)

    async def may_leave_prefill(self) -> bool:
        """Whether decode may compute the prompt when no prefill replica is there for it."""
        return await self._trials.may_leave_prefill(self._case)

    def lost(
        self, role: Role, lost: ReplicaLost, then: str, *, began: float, answering: bool = False
    ) -> Unwanted | None:
        """Takes note of a replica that was lost; says so if the prompt gets no other one.

        Args:
            then: what is done if it gets one, for the log.
            began: when the prompt was sent there.
            answering: the replica had given output.
        """
        standing = self.standing
        if lost.held:
            self._trials.suspects.alive(lost.replica_id, lost.alive_at)
            standing = self._trials.suspects.died(
                self._case, role, lost.replica_id, began=began, answering=answering
            )
        if standing is Standing.CONDEMNED:
            warn(self._request, f"{lost}; no other one is risked")
            return self.condemned()
        warn(self._request, f"{lost}; {then}")
        return None

    def alive(self, replica_id: str, began: float) -> None:
        """A replica answered what it was asked at ``began``."""
        self._trials.suspects.alive(replica_id, began)

    def passed(self, role: Role) -> None:
        """The role's work is done."""
        self._trials.suspects.passed(self._case, role)

    def over(self, role: Role) -> None:
        """Its trial has ended, in whichever way; without one, nothing happens."""
        self._trials.over(self._case, role)
