"""Replicas that answer the coordinator by a script, and requests driven through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from deployments.errors import ReplicaLost
from deployments.role import Role
from deployments.router.coordinator import Coordinator
from deployments.router.request_state import RetryPolicy
from deployments.streams.answer import Complete, Refusal
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer, Sent
from tests.support.scripted.tickets import make_ticket
from transfer.ticket import Ticket, UnreadableTicket, read_ticket

T1, T2, SHARED = make_ticket("1"), make_ticket("2"), make_ticket("3", readers=2)
BAD = Refusal("temperature: too hot", "bad", code=400)
CHUNKS = ["data: one\n\n", "data: two\n\n", "data: [DONE]\n\n"]
INFO = RawRequestInfo(headers={"x-request-id": "r1"})
HANG = "hang"
"""In a script: the replica does not answer until it is cancelled."""


@dataclass
class FakeCaller:
    """Replicas that answer by a script, and remember what became of every call.

    Attributes:
        prefills: what each prefill call does: answer, raise, or hang.
        decodes: what each decode call does, chunk by chunk.
        checks: what each check of several prompts says.
        wells: who says that it is well, each time that is asked; by default ``prefill`` or
            ``decode`` with the number of the question.
        asked_well: roles and exclusions of these questions.
        onlys: the one replica that each call was for.
        decoders: decode replicas that are well.
        held: unset, notices to owners do not come back.
    """

    prefills: list[Any] = field(default_factory=list)
    decodes: list[Sequence[Any]] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)
    wells: list[Any] = field(default_factory=list)
    asked_well: list[tuple[str, set[str]]] = field(default_factory=list)
    onlys: list[str | None] = field(default_factory=list)
    decoders: int = 2
    log: list[tuple[Any, ...]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    sent: list[Sent | None] = field(default_factory=list)
    aborted: list[tuple[str, Ticket | UnreadableTicket]] = field(default_factory=list)
    abort_error: Exception | None = None
    held: asyncio.Event | None = None
    open_calls: int = 0

    async def check(self, request: GenerationRequest) -> Complete | None:
        self.log.append(("check", request.method, request.http, set()))
        step = self.checks.pop(0) if self.checks else None
        if isinstance(step, Exception):
            raise step
        return step

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        self.log.append(("prefill", request.method, request.http, set(exclude)))
        self.onlys.append(only)
        self.requests.append(request.body)
        self.sent.append(request.sent)
        self.open_calls += 1
        try:
            step = self.prefills.pop(0)
            await self._play(step)
            assert isinstance(step, PrefillAnswer)
            return step
        finally:
            self.open_calls -= 1

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        self.log.append(("decode", request.method, request.http, set(exclude)))
        self.onlys.append(only)
        self.requests.append(request.body)
        self.sent.append(request.sent)
        self.open_calls += 1
        try:
            for step in self.decodes.pop(0):
                await self._play(step)
                if isinstance(step, Output):
                    yield step
                    continue
                yield Output(step, "d1")
        finally:
            self.open_calls -= 1

    async def well(self, role: Role, exclude: frozenset[str]) -> str:
        self.asked_well.append((role, set(exclude)))
        step = self.wells.pop(0) if self.wells else f"{role}-{len(self.asked_well)}"
        if isinstance(step, Exception):
            raise step
        return str(step)

    async def replicas(self, role: Role) -> int:
        assert role == "decode"
        return self.decoders

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        if self.held is not None:
            await self.held.wait()
        self.aborted.append((replica_id, ticket))
        if self.abort_error is not None:
            raise self.abort_error
        return 1

    async def _play(self, step: Any) -> None:
        if step == HANG:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if isinstance(step, Exception):
            raise step

    def calls(self) -> list[tuple[str, set[str]]]:
        return [(entry[0], entry[3]) for entry in self.log]

    def brought(self) -> list[Ticket | UnreadableTicket | None]:
        """The ticket of every call."""
        all_params = [request.kv_transfer_params for request in self.requests]
        return [None if params is None else read_ticket(params) for params in all_params]


POLICY = RetryPolicy(attempts=3, backoff_s=0.0)


def make_request() -> Any:
    return CompletionRequest(model="m", prompt="Once", stream=True)


def generation(body: Any = None, sent: Sent | None = None) -> GenerationRequest:
    return GenerationRequest("completions", body or make_request(), INFO, sent)


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine; leftover tasks are a failure."""

    async def main() -> None:
        await coroutine
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    asyncio.run(main())


async def answer_of(
    coordinator: Coordinator, request: GenerationRequest, *, bypass: bool = False
) -> list[Any]:
    """All that a request gets."""
    answer = await coordinator.answer(request, bypass=bypass)
    if not isinstance(answer, EventStream):
        return [answer]
    async with aclosing(answer):
        return [events async for events in answer]


def served(
    caller: FakeCaller,
    *,
    bypass: bool = False,
    request: Any = None,
    sent: Sent | None = None,
    raises: type | None = None,
) -> list[Any]:
    """All that a request gets, with notices to owners carried out."""
    items: list[Any] = []

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        answer = answer_of(coordinator, generation(request, sent), bypass=bypass)
        if raises is not None:
            with pytest.raises(raises):
                await answer
        else:
            items.extend(await answer)
        await coordinator.drain()

    drive(main())
    assert caller.open_calls == 0
    return items


def lost(replica_id: str, role: Role = "decode", *, held: bool = True) -> ReplicaLost:
    return ReplicaLost(role, replica_id, "it died", held=held)


def part(text: str, *token_ids: int, resumable: bool = True, created: int | None = None) -> Output:
    """A chunk of a stream that may go on elsewhere."""
    return Output(
        f"data: {text}\n\n",
        "d1",
        text=text,
        token_ids=token_ids,
        resumable=resumable,
        created=created,
    )
