"""What calls replicas, as the coordinator sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from deployments.role import Role
from deployments.streams.answer import Complete
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer
from transfer.ticket import Ticket, UnreadableTicket


class ReplicaClient(Protocol):
    """Calls replicas, through Serve or over HTTP (:mod:`deployments.callers`).

    All from one event loop. Cancelling a call, or closing its iterator, ends the work at the
    replica; a ticket that a cancelled prefill leaves behind all the same is the client's to give
    up.
    """

    async def check(self, request: GenerationRequest) -> Complete | None:
        """Why a replica would refuse a request with several prompts; None if it would not.

        Nothing is computed. Raises NoReplica, ReplicaLost: nobody could say.
        """
        ...

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        """Has a replica compute the prompt: ``only``, or one not in ``exclude``.

        Raises NoReplica, ReplicaLost.
        """
        ...

    def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        """Streams a replica's answer. Raises NoReplica, ReplicaLost, the latter at any time."""
        ...

    async def well(self, role: Role, exclude: frozenset[str]) -> str:
        """A replica of a role that has just said that it is well.

        Raises NoReplica; ReplicaLost, not ``held``: the one that was asked is not.
        """
        ...

    async def replicas(self, role: Role) -> int:
        """How many replicas of a role say that they are well."""
        ...

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        """Tells the owner that this hand-off, which has an id, will not be read.

        Returns how many offers were pinned. Raises NoReplica, ReplicaLost.
        """
        ...
