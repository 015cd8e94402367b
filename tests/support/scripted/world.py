"""Replicas whose every call waits for a test to say how it goes on, and an owner that counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from deployments.role import Role
from deployments.streams.answer import Complete, Item, WholeAnswer
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer
from tests.support.scripted.tickets import make_ticket
from transfer.ticket import Ticket, UnreadableTicket, read_ticket


@dataclass(eq=False)
class PrefillCall:
    """A prefill that is asked for; ``done`` is set by the test."""

    request: GenerationRequest
    only: str | None
    done: asyncio.Future[PrefillAnswer]


@dataclass(eq=False)
class DecodeCall:
    """A decode that is asked for; the test puts outputs, an error, or None for its end."""

    request: GenerationRequest
    only: str | None
    items: asyncio.Queue[Output | Exception | None] = field(default_factory=asyncio.Queue)
    outputs: int = 0

    @property
    def ticket(self) -> Ticket | None:
        params = self.request.body.kv_transfer_params
        return None if params is None else Ticket.from_params(params)

    def content(self, *, last: bool) -> Item:
        """What a replica would say next: an event, or the whole answer."""
        body = self.request.body
        choices = [
            {"index": index, "text": "x", "finish_reason": "stop" if last else None}
            for index in range(body.n or 1)
        ]
        answer = json.dumps({"id": body.request_id, "created": 1, "choices": choices})
        return f"data: {answer}\n\n" if body.stream else WholeAnswer(answer.encode())


class World:
    """All replicas, at the seam where the coordinator calls them.

    Attributes:
        pinned: readers that are left of every hand-off that is offered.
        told: hand-offs whose owner was told that they will not be read.
        decoders: decode replicas that are well.
    """

    def __init__(self) -> None:
        self.prefills: list[PrefillCall] = []
        self.decodes: list[DecodeCall] = []
        self.pinned: dict[str, int] = {}
        self.told: list[str] = []
        self.most_under_way = 0
        self.decoders = 2
        self._offered = 0
        self._starts = {"prefill": 0, "decode": 0}

    # ---- what the coordinator calls --------------------------------------------------------------

    async def check(self, request: GenerationRequest) -> Complete | None:
        return None

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        call = PrefillCall(request, only, asyncio.get_running_loop().create_future())
        self.prefills.append(call)
        self._count()
        try:
            return await asyncio.shield(call.done)
        except asyncio.CancelledError:
            # An answer that comes when nobody waits is the caller's to give back.
            if call.done.done() and not call.done.exception():
                self._forget(call.done.result().ticket)
            raise
        finally:
            self.prefills.remove(call)

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        call = DecodeCall(request, only)
        self.decodes.append(call)
        self._count()
        try:
            while (item := await call.items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.decodes.remove(call)

    async def well(self, role: Role, exclude: frozenset[str]) -> str:
        return self.engine(role)

    async def replicas(self, role: Role) -> int:
        return self.decoders

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        self.told.append(ticket.handoff_id)
        return self._forget(ticket)

    # ---- what a test does ------------------------------------------------------------------------

    def engine(self, role: Role) -> str:
        """The engine of a role that is alive."""
        return f"{role}-{self._starts[role]}"

    def kill(self, role: Role) -> str:
        """Ends it, and starts another one; its name."""
        name = self.engine(role)
        self._starts[role] += 1
        return name

    def offer(self, readers: int, **changes: Any) -> Ticket | UnreadableTicket:
        """Pins a prompt; returns its ticket, with ``changes`` as a broken owner might make them."""
        self._offered += 1
        name = f"{self._offered:032x}"
        self.pinned[name] = readers
        ticket = make_ticket(handoff_id=name, readers=readers)
        return read_ticket({**ticket.to_params(), **changes})

    def read(self, ticket: Ticket | None, readers: int = 1) -> None:
        """Readers read; the last one releases."""
        name = "" if ticket is None else ticket.handoff_id
        if name in self.pinned:
            self.pinned[name] -= readers
            if self.pinned[name] <= 0:
                del self.pinned[name]

    def _forget(self, ticket: Ticket | UnreadableTicket | None) -> int:
        return int(ticket is not None and self.pinned.pop(ticket.handoff_id, None) is not None)

    def _count(self) -> None:
        self.most_under_way = max(self.most_under_way, len(self.prefills) + len(self.decodes))
