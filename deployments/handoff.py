"""The coordinator: carries out what the hand-off's state machine says, one request at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

from deployments.admission import UNBOUNDED, Admission, Place, PromptSize
from deployments.background import Background
from deployments.errors import (
    ContinuationMismatch,
    NoReplica,
    Overloaded,
    ReplicaLost,
    ServiceUnavailable,
)
from deployments.generation import GenerationRequest, Output, PrefillAnswer, Transcript
from deployments.handoff_state import (
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    DecodeEnded,
    DecodeLost,
    FirstChunk,
    GiveUp,
    Handoff,
    Instruction,
    Prefilled,
    PrefillLost,
    Refused,
    RetryPolicy,
    Start,
    TicketsUnread,
)
from transfer import faults

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


class Caller(Protocol):
    """What calls replicas: :class:`~deployments.replica.ReplicaCaller` does it through Serve.

    All from one event loop. Cancelling a call, or closing its iterator, ends the work at the
    replica; tickets that a cancelled prefill leaves behind all the same are the caller's to abort.
    """

    async def prefill(self, request: GenerationRequest, exclude: frozenset[str]) -> PrefillAnswer:
        """Has a replica not in ``exclude`` compute the prompts. Raises NoReplica, ReplicaLost."""
        ...

    def decode(
        self, request: GenerationRequest, exclude: frozenset[str]
    ) -> AsyncGenerator[Output, None]:
        """Streams a replica's answer. Raises NoReplica, ReplicaLost, the latter at any time."""
        ...

    async def abort(self, replica_id: str, handoff_ids: tuple[str, ...]) -> int:
        """Tells the owner; returns how many were pinned. Raises NoReplica, ReplicaLost."""
        ...


class RouterEvent(Enum):
    """What a router counts; all of it is out of the ordinary."""

    REFUSED = "refused"
    PREFILL_LOST = "prefill_lost"
    NO_PREFILL = "no_prefill"
    DECODE_LOST = "decode_lost"
    NO_DECODE = "no_decode"
    TICKETS_UNREAD = "tickets_unread"
    STREAM_RESUMED = "stream_resumed"
    STREAM_BROKEN = "stream_broken"


class Coordinator:
    """Runs requests through prefill and decode.

    Args:
        caller: calls replicas.
        policy: retry budget of every request.
        admission: who is let in; without one, everybody.
        count: told of every :class:`RouterEvent`.
    """

    def __init__(
        self,
        caller: Caller,
        policy: RetryPolicy,
        admission: Admission | None = None,
        count: Callable[[RouterEvent], None] = lambda event: None,
    ) -> None:
        self._count = count
        self._caller = caller
        self._admission = admission or Admission(UNBOUNDED)
        self._policy = policy
        self._background = Background()

    async def run(
        self, request: GenerationRequest, *, bypass: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Yields what the client gets: one response, or server-sent events, framed.

        Closing the iterator, or cancelling the task that consumes it, aborts both engines and
        frees the blocks.

        Args:
            bypass: skip prefill; decode computes the prompt itself.

        Raises:
            Overloaded: it was not let in; no replica saw it.
            ServiceUnavailable: no replica could serve it; nothing was sent.
        """
        size = PromptSize.of(request.body)
        try:
            place = self._admission.enter(size, time.monotonic(), prefill=not bypass)
        except Overloaded:
            self._count(RouterEvent.REFUSED)
            raise
        handoff = Handoff(self._policy, random.random)
        transcript = Transcript(request.sent)
        try:
            instructions = handoff.on(Start(bypass))
            while instructions:
                step = self._carry_out_notices(instructions)
                if step is None:
                    return
                await asyncio.sleep(getattr(step, "pause_s", 0.0))
                request = replace(request, sent=transcript.sent())
                match step:
                    case CallPrefill():
                        instructions = await self._prefill(handoff, step, request, place)
                    case CallDecode():
                        instructions = []
                        attempt = self._decode(handoff, step, request, transcript)
                        async with aclosing(attempt):
                            async for item in attempt:
                                if isinstance(item, _Next):
                                    instructions = item.instructions
                                else:
                                    yield item
                    case Answer(error=None, streaming=False):
                        raise ServiceUnavailable("no decode replica could serve the request")
                    case Answer(error=error, streaming=False):
                        yield error
                        return
                    case Answer(error=error):
                        self._count(RouterEvent.STREAM_BROKEN)
                        yield _stream_error(error)
                        return
        finally:
            place.leave(time.monotonic())
            self._carry_out_notices(handoff.on(ClientGone()))

    async def drain(self) -> None:
        """Waits until all notices to owners are through."""
        await self._background.drain()

    # ------------------------------------------------------------------------------------------

    async def _prefill(
        self, handoff: Handoff, step: CallPrefill, request: GenerationRequest, place: Place
    ) -> list[Instruction]:
        await faults.reach_async("router.queued")
        try:
            answer = await self._caller.prefill(request, step.exclude)
        except ReplicaLost as lost:
            logger.warning("%s; trying another", lost)
            self._count(RouterEvent.PREFILL_LOST)
            place.not_prefilled(time.monotonic())
            return handoff.on(PrefillLost(lost.replica_id))
        except NoReplica as missing:
            logger.warning("%s; decode computes the prompt", missing)
            self._count(RouterEvent.NO_PREFILL)
            place.not_prefilled(time.monotonic())
            return handoff.on(PrefillLost(None))
        if answer.error is not None:
            place.not_prefilled(time.monotonic())
            return handoff.on(Refused(answer.error))
        tokens = sum(int(ticket.get("num_tokens", 0)) for ticket in answer.tickets)
        place.prefilled(answer.replica_id, tokens, time.monotonic())
        return handoff.on(Prefilled(answer.replica_id, answer.tickets))

    async def _decode(
        self,
        handoff: Handoff,
        step: CallDecode,
        request: GenerationRequest,
        transcript: Transcript,
    ) -> AsyncGenerator[Any, None]:
        if step.tickets:
            await faults.reach_async("router.ticket", step.tickets[0].get("remote_engine_id", ""))
        number = 0
        outputs = self._caller.decode(request.with_tickets(step.tickets), step.exclude)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if output.unread:
                        self._count(RouterEvent.TICKETS_UNREAD)
                        self._carry_out_notices(handoff.on(TicketsUnread()))
                        continue
                    number += 1
                    await faults.reach_async("router.stream" if number > 1 else "router.output")
                    if number == 1:
                        if output.refused:
                            yield _Next(handoff.on(Refused(output.content)))
                            return
                        handoff.on(FirstChunk())
                        if request.sent is not None and request.sent.created is not None:
                            self._count(RouterEvent.STREAM_RESUMED)
                    transcript.add(output)
                    if output.content:
                        yield output.content
        except ReplicaLost as lost:
            self._count(RouterEvent.DECODE_LOST)
            resumable = transcript.sent() is not None
            logger.warning(
                "%s%s", lost, "; trying another" if not number or resumable else " in mid-stream"
            )
            yield _Next(handoff.on(DecodeLost(lost.replica_id, resumable)))
            return
        except ContinuationMismatch as mismatch:
            yield _Next(handoff.on(Refused(mismatch)))
            return
        except NoReplica as missing:
            logger.warning("%s", missing)
            self._count(RouterEvent.NO_DECODE)
            yield _Next(handoff.on(DecodeLost(None)))
            return
        yield _Next(handoff.on(DecodeEnded()))

    def _carry_out_notices(self, instructions: list[Instruction]) -> Instruction | None:
        """Sends notices to owners in the background; returns the one step that is left, if any."""
        step = None
        for instruction in instructions:
            if isinstance(instruction, GiveUp):
                self._background.start(self._give_up(instruction))
            else:
                step = instruction
        return step

    async def _give_up(self, notice: GiveUp) -> None:
        try:
            pinned = await self._caller.abort(notice.replica_id, notice.handoff_ids)
        except (NoReplica, ReplicaLost) as gone:
            logger.info("hand-offs %s not given up: %s", notice.handoff_ids, gone)
        else:
            logger.info("gave up %s: %d were pinned", notice.handoff_ids, pinned)


class _Next:
    """Marks the end of a decode attempt among its chunks."""

    __slots__ = ("instructions",)

    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions


def _stream_error(error: Any) -> str:
    """A final event in the form of OpenAI's streaming errors.

    Args:
        error: why the stream cannot go on: a replica's refusal, an exception, or None if the
            replica was lost.
    """
    told = getattr(getattr(error, "error", None), "message", error)
    message = "the decode replica was lost while it answered"
    if told is not None:
        message = f"{message}, and no other one could go on: {told}"
    body = {"message": message, "type": "server_error", "param": None, "code": 503}
    return f"data: {json.dumps({'error': body})}\n\ndata: [DONE]\n\n"
