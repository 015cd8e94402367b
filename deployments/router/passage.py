"""One prompt's way through replicas: carries out what its state machine says."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from deployments.background import Background
from deployments.errors import (
    Condemned,
    ContinuationMismatch,
    NoReplica,
    ReplicaLost,
    ServiceUnavailable,
)
from deployments.role import Role
from deployments.router.admission import Place, PromptSize, Waiting
from deployments.router.replica_client import ReplicaClient
from deployments.router.request_state import (
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    DecodeEnded,
    DecodeLost,
    FirstChunk,
    GiveUp,
    Instruction,
    Prefilled,
    PrefillLost,
    Refused,
    RequestState,
    RetryPolicy,
    Start,
    TicketUnread,
    Unwanted,
)
from deployments.router.router_event import RouterEvent
from deployments.router.suspects import Case, Standing
from deployments.router.trials import Trials
from deployments.streams.generation import GenerationRequest, PrefillAnswer, Transcript, WholeAnswer
from deployments.streams.stream_errors import ENDS_ENGINES, stream_error
from transfer import faults
from transfer.ticket import Ticket, UnreadableTicket

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

_NOTICE = "giving up a hand-off"


class Passage:
    """Carries prompts through prefill and decode, each by itself.

    Args:
        client: calls replicas.
        policy: retry budget of every prompt.
        count: told of every :class:`RouterEvent`.
    """

    def __init__(
        self, client: ReplicaClient, policy: RetryPolicy, count: Callable[[RouterEvent], None]
    ) -> None:
        self._client = client
        self._policy = policy
        self._count = count
        self._trials = Trials(client, time.monotonic)
        self._background = Background()

    async def run(
        self, request: GenerationRequest, place: Place, *, bypass: bool
    ) -> AsyncGenerator[Any, None]:
        """Yields what the client gets: a whole answer, a refusal, or server-sent events, framed.

        Closing the iterator, or cancelling the task that consumes it, aborts both engines and
        frees the blocks.

        Args:
            request: of one prompt, unless it bypasses prefill.

        Raises:
            ServiceUnavailable: no replica could serve it; nothing was sent.
        """
        case = Case(request)
        if self._trials.suspects.standing(case) is Standing.CONDEMNED:
            self._count(RouterEvent.CONDEMNED)
            yield ENDS_ENGINES
            return
        own = uuid.uuid4().hex
        renamed = _Renamed(own, request.client_id)
        request = request.named(own)
        state = RequestState(self._policy, random.random)
        transcript = Transcript(request.sent)
        now = time.monotonic()
        waiting = None if bypass else place.wait(PromptSize.of(request.body), now)
        try:
            instructions = state.on(Start(bypass))
            while instructions:
                step = self._carry_out_notices(instructions)
                instructions = []
                request = replace(request, sent=transcript.sent())
                match step:
                    case CallPrefill(pause_s=pause_s):
                        await asyncio.sleep(pause_s)
                        instructions = await self._prefill(state, step, request, case, waiting)
                    case CallDecode(pause_s=pause_s):
                        await asyncio.sleep(pause_s)
                        attempt = self._decode(state, step, request, case, transcript, instructions)
                        async with aclosing(attempt):
                            async for content in attempt:
                                yield renamed(content)
                    case Answer(error=None, streaming=False):
                        raise ServiceUnavailable("no replica could serve the request")
                    case Answer(error=error, streaming=False):
                        yield renamed(error)
                    case Answer(error=error):
                        self._count(RouterEvent.STREAM_BROKEN)
                        yield stream_error(error)
        finally:
            self._trials.over(case, "decode")
            if waiting is not None:
                waiting.not_prefilled(time.monotonic())
            self._carry_out_notices(state.on(ClientGone()))

    async def drain(self) -> None:
        """Waits until all notices to owners are through."""
        await self._background.drain()

    # ------------------------------------------------------------------------------------------

    async def _prefill(
        self,
        state: RequestState,
        step: CallPrefill,
        request: GenerationRequest,
        case: Case,
        waiting: Waiting | None,
    ) -> list[Instruction]:
        await faults.reach_async("router.queued")
        event: PrefillLost | Prefilled | Refused | Unwanted
        tokens = None
        began = time.monotonic()
        if waiting is not None and self._trials.suspects.standing(case) is not Standing.CLEAR:
            # What it spends in line for its trial says nothing of what prefill costs others.
            waiting.not_prefilled(began)
        try:
            await self._place_at_decode(case, state.decode_excluded, request)
            only = await self._trial(case, "prefill", step.exclude, request)
            began = time.monotonic()
            answer = await self._client.prefill(request, step.exclude, only)
        except ReplicaLost as lost:
            self._count(RouterEvent.PREFILL_LOST)
            unwanted = self._lost(case, "prefill", lost, request, "trying another", began=began)
            event = unwanted or PrefillLost(
                lost.replica_id, await self._trials.may_leave_prefill(case)
            )
        except NoReplica as missing:
            self._count(RouterEvent.NO_PREFILL)
            fallback = await self._trials.may_leave_prefill(case)
            then = "decode computes the prompt" if fallback else "nor may decode compute the prompt"
            self._say(f"{missing}; {then}", request)
            event = PrefillLost(None, fallback)
        except Condemned:
            event = self._condemned(request)
        else:
            if answer.error is not None:
                event = Refused(answer.error)
            else:
                self._trials.suspects.alive(answer.replica_id, began)
                self._trials.suspects.passed(case, "prefill")
                ticket = self._ticket(answer, request)
                event = Prefilled(answer.replica_id, ticket)
                tokens = 0 if ticket is None else ticket.num_tokens
        finally:
            self._trials.over(case, "prefill")
        if waiting is not None:
            if tokens is None:
                waiting.not_prefilled(time.monotonic())
            else:
                waiting.prefilled(answer.replica_id, tokens, time.monotonic())
        return state.on(event)

    async def _place_at_decode(
        self, case: Case, exclude: frozenset[str], request: GenerationRequest
    ) -> None:
        """Has a suspect of what happened at decode wait for its trial there before prefill.

        Afterwards it would wait with pinned blocks.
        """
        if self._trials.suspects.has_ended_decode(case):
            # Whether any is there is seen when decode is called.
            with suppress(NoReplica, ReplicaLost):
                await self._trial(case, "decode", exclude, request)

    async def _trial(
        self,
        case: Case,
        role: Role,
        exclude: frozenset[str],
        request: GenerationRequest,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> str | None:
        """The replica that a suspect is tried on; None: the request is none."""
        taken = self._trials.suspects.resume_trial(case, role)
        only = taken or await self._trials.replica_for(case, role, exclude, before_waiting)
        if only is not None and taken is None:
            self._say(f"is tried apart from others on {role} replica {only}", request)
            self._count(RouterEvent.SUSPECT_TRIED)
        return only

    def _lost(
        self,
        case: Case,
        role: Role,
        lost: ReplicaLost,
        request: GenerationRequest,
        then: str,
        *,
        began: float,
        answering: bool = False,
    ) -> Unwanted | None:
        """Takes note of a replica that was lost; says so if the request gets no other one."""
        standing = self._trials.suspects.standing(case)
        if lost.held:
            self._trials.suspects.alive(lost.replica_id, lost.alive_at)
            standing = self._trials.suspects.died(
                case, role, lost.replica_id, began=began, answering=answering
            )
        if standing is Standing.CONDEMNED:
            self._say(f"{lost}; no other one is risked", request)
            return self._condemned(request)
        self._say(f"{lost}; {then}", request)
        return None

    def _condemned(self, request: GenerationRequest) -> Unwanted:
        self._count(RouterEvent.CONDEMNED)
        return Unwanted(ENDS_ENGINES)

    def _ticket(self, answer: PrefillAnswer, request: GenerationRequest) -> Ticket | None:
        """The ticket that came. One that cannot be read is told to its owner at once."""
        ticket = answer.ticket
        if not isinstance(ticket, UnreadableTicket):
            return ticket
        self._say(
            f"its ticket cannot be read ({ticket.fault}); decode computes the prompt", request
        )
        if ticket.handoff_id:
            self._background.start(_NOTICE, self._give_up(answer.replica_id, ticket))
        return None

    async def _decode(
        self,
        state: RequestState,
        step: CallDecode,
        request: GenerationRequest,
        case: Case,
        transcript: Transcript,
        then: list[Instruction],
    ) -> AsyncGenerator[Any, None]:
        """Yields what comes; when it is over, adds to ``then`` what is to be done next."""
        ticket = step.ticket
        if ticket is not None:
            await faults.reach_async("router.ticket", ticket.engine_id)

        def lay_down() -> None:
            nonlocal ticket
            ticket = None
            self._carry_out_notices(state.on(TicketUnread()))

        number, began = 0, time.monotonic()
        try:
            only = await self._trial(case, "decode", step.exclude, request, lay_down)
            began = time.monotonic()
            outputs = self._client.decode(request.with_ticket(ticket), step.exclude, only)
            async with aclosing(outputs):
                async for output in outputs:
                    if output.unread:
                        self._count(RouterEvent.TICKETS_UNREAD)
                        self._carry_out_notices(state.on(TicketUnread()))
                        continue
                    number += 1
                    await faults.reach_async("router.stream" if number > 1 else "router.output")
                    if number == 1:
                        if output.refused:
                            then += state.on(Refused(output.content))
                            return
                        state.on(FirstChunk())
                        self._trials.over(case, "decode")
                        self._trials.suspects.alive(output.replica_id, began)
                        if request.sent is not None and request.sent.created is not None:
                            self._count(RouterEvent.STREAM_RESUMED)
                    transcript.add(output)
                    if output.content:
                        yield output.content
        except ReplicaLost as lost:
            self._count(RouterEvent.DECODE_LOST)
            resumable = transcript.sent() is not None
            other = "trying another" if not number or resumable else "in mid-stream"
            unwanted = self._lost(
                case, "decode", lost, request, other, began=began, answering=number > 0
            )
            then += state.on(unwanted or DecodeLost(lost.replica_id, resumable))
        except Condemned:
            then += state.on(self._condemned(request))
        except ContinuationMismatch as mismatch:
            then += state.on(Refused(mismatch))
        except NoReplica as missing:
            self._say(str(missing), request)
            self._count(RouterEvent.NO_DECODE)
            then += state.on(DecodeLost(None))
        else:
            self._trials.suspects.passed(case, "decode")
            then += state.on(DecodeEnded())
        finally:
            self._trials.over(case, "decode")

    def _carry_out_notices(self, instructions: list[Instruction]) -> Instruction | None:
        """Sends notices to owners in the background; returns the one step that is left, if any."""
        step = None
        for instruction in instructions:
            if isinstance(instruction, GiveUp):
                notice = self._give_up(instruction.replica_id, instruction.ticket)
                self._background.start(_NOTICE, notice)
            else:
                step = instruction
        return step

    async def _give_up(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> None:
        name = ticket.handoff_id
        try:
            pinned = await self._client.abort(replica_id, ticket)
        except (NoReplica, ReplicaLost) as gone:
            logger.info("hand-off %s not given up: %s", name, gone)
        else:
            logger.info("gave up hand-off %s: %d were pinned", name, pinned)

    def _say(self, text: str, request: GenerationRequest) -> None:
        own = request.body.request_id
        logger.warning("request %s (inside: %s): %s", request.name_in_logs, own, text)


class _Renamed:
    """Gives an answer the client's name for it, in the place of Baton's own.

    The own one is random, so that nothing else in an answer can be taken for it.
    """

    def __init__(self, own: str, client_id: str) -> None:
        self._own = own
        self._told = json.dumps(client_id or own)[1:-1]

    def __call__(self, content: Any) -> Any:
        if isinstance(content, str):
            return content.replace(self._own, self._told)
        if isinstance(content, WholeAnswer):
            renamed = content.content.replace(self._own.encode(), self._told.encode())
            return replace(content, content=renamed)
        return content
