"""One prompt's way through replicas: carries out what its state machine says."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from deployments.errors import Condemned, NoReplica, ReplicaLost, ServiceUnavailable
from deployments.router.admission import Place, PromptSize, Waiting
from deployments.router.decode_attempt import DecodeAttempt
from deployments.router.notices import Notices
from deployments.router.replica_client import ReplicaClient
from deployments.router.request_log import warn
from deployments.router.request_state import (
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    Event,
    GiveUp,
    Prefilled,
    PrefillLost,
    Refused,
    RequestState,
    RetryPolicy,
    Start,
    Unwanted,
)
from deployments.router.risk import Risk
from deployments.router.router_event import RouterEvent
from deployments.router.suspects import Standing
from deployments.router.trials import Trials
from deployments.streams.answer import Item, Refusal, WholeAnswer
from deployments.streams.generation import GenerationRequest, PrefillAnswer, Transcript
from deployments.streams.stream_errors import stream_error
from transfer import faults
from transfer.ticket import Ticket, UnreadableTicket


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all passages of a router share.

    Attributes:
        client: calls replicas.
        policy: retry budget of every prompt.
        trials: keeps suspects apart.
        notices: tells owners of tickets that will not be read.
        count: told of every :class:`RouterEvent`.
    """

    client: ReplicaClient
    policy: RetryPolicy
    trials: Trials
    notices: Notices
    count: Callable[[RouterEvent], None]


class Passage:
    """Carries one prompt through prefill and decode.

    Args:
        request: of one prompt, unless it bypasses prefill.
        place: the request's.
        surroundings: what it shares with others.
        bypass: skip prefill; decode computes the prompt.
    """

    def __init__(
        self, request: GenerationRequest, place: Place, surroundings: Surroundings, *, bypass: bool
    ) -> None:
        own = uuid.uuid4().hex
        self._renamed = _Renamed(own, request.client_id)
        self._request = request.named(own)
        self._place = place
        self._bypass = bypass
        self._client = surroundings.client
        self._notices = surroundings.notices
        self._count = surroundings.count
        self._risk = Risk(self._request, surroundings.trials, surroundings.count)
        self._state = RequestState(surroundings.policy, random.random)
        self._transcript = Transcript(request.sent)
        self._waiting: Waiting | None = None

    async def items(self) -> AsyncGenerator[Item, None]:
        """What the client gets: one complete answer, or server-sent events. Iterated once.

        Closing the iterator, or cancelling the task that consumes it, aborts both engines and
        frees the blocks.

        Raises:
            ServiceUnavailable: no replica could serve it; nothing was sent.
        """
        if self._risk.standing is Standing.CONDEMNED:
            yield self._risk.condemned().error
            return
        if not self._bypass:
            size = PromptSize.of(self._request.body)
            self._waiting = self._place.wait(size, time.monotonic())
        try:
            step = self._on(Start(self._bypass))
            while step is not None:
                self._request = replace(self._request, sent=self._transcript.sent())
                match step:
                    case CallPrefill():
                        await asyncio.sleep(step.pause_s)
                        step = self._on(await self._prefill(step))
                    case CallDecode():
                        await asyncio.sleep(step.pause_s)
                        attempt = self._decode_attempt(step)
                        async with aclosing(attempt.items()) as items:
                            async for item in items:
                                yield self._renamed(item)
                        step = self._on(attempt.outcome)
                    case Answer():
                        yield self._renamed(self._end(step))
                        step = None
        finally:
            self._risk.over("decode")
            if self._waiting is not None:
                self._waiting.not_prefilled(time.monotonic())
            self._on(ClientGone())

    # ------------------------------------------------------------------------------------------

    def _on(self, event: Event) -> CallPrefill | CallDecode | Answer | None:
        """Tells owners what they have to know; returns the one step that is left, if any."""
        step = None
        for instruction in self._state.on(event):
            if isinstance(instruction, GiveUp):
                self._notices.give_up(instruction.replica_id, instruction.ticket)
            else:
                step = instruction
        return step

    async def _prefill(self, step: CallPrefill) -> Prefilled | PrefillLost | Refused | Unwanted:
        """Calls a prefill replica; returns how that ended."""
        await faults.reach_async("router.queued")
        began = time.monotonic()
        if self._waiting is not None and self._risk.standing is not Standing.CLEAR:
            # What it spends in line for its trial says nothing of what prefill costs others.
            self._waiting.not_prefilled(began)
        outcome: Prefilled | PrefillLost | Refused | Unwanted
        try:
            await self._risk.place_at_decode(self._state.decode_excluded)
            only = await self._risk.replica_for("prefill", step.exclude)
            began = time.monotonic()
            answer = await self._client.prefill(self._request, step.exclude, only)
            outcome = self._answered(answer, began)
        except ReplicaLost as lost:
            self._count(RouterEvent.PREFILL_LOST)
            unwanted = self._risk.lost("prefill", lost, "trying another", began=began)
            outcome = unwanted or PrefillLost(lost.replica_id, await self._risk.may_leave_prefill())
        except NoReplica as missing:
            self._count(RouterEvent.NO_PREFILL)
            fallback = await self._risk.may_leave_prefill()
            then = "decode computes the prompt" if fallback else "nor may decode compute the prompt"
            warn(self._request, f"{missing}; {then}")
            outcome = PrefillLost(None, fallback)
        except Condemned:
            outcome = self._risk.condemned()
        finally:
            self._risk.over("prefill")
        self._waited(outcome)
        return outcome

    def _answered(self, answer: PrefillAnswer, began: float) -> Prefilled | Refused:
        if answer.error is not None:
            return Refused(answer.error)
        self._risk.alive(answer.replica_id, began)
        self._risk.passed("prefill")
        return Prefilled(answer.replica_id, self._ticket(answer))

    def _ticket(self, answer: PrefillAnswer) -> Ticket | None:
        """The ticket that came. One that cannot be read is told to its owner at once."""
        ticket = answer.ticket
        if not isinstance(ticket, UnreadableTicket):
            return ticket
        fault = f"its ticket cannot be read ({ticket.fault}); decode computes the prompt"
        warn(self._request, fault)
        if ticket.handoff_id:
            self._notices.give_up(answer.replica_id, ticket)
        return None

    def _waited(self, outcome: Prefilled | PrefillLost | Refused | Unwanted) -> None:
        """Prefill's queue is told what the prompt cost, if that can be said."""
        if self._waiting is None:
            return
        if isinstance(outcome, Prefilled):
            tokens = 0 if outcome.ticket is None else outcome.ticket.num_tokens
            self._waiting.prefilled(outcome.replica_id, tokens, time.monotonic())
        else:
            self._waiting.not_prefilled(time.monotonic())

    def _decode_attempt(self, step: CallDecode) -> DecodeAttempt:
        return DecodeAttempt(
            self._client,
            self._request,
            step,
            risk=self._risk,
            transcript=self._transcript,
            happened=self._on,
            count=self._count,
        )

    def _end(self, answer: Answer) -> Item:
        """The error that the answer ends with, or consists of."""
        if answer.streaming:
            self._count(RouterEvent.STREAM_BROKEN)
            return stream_error(answer.error)
        if answer.error is None:
            raise ServiceUnavailable("no replica could serve the request")
        return answer.error


class _Renamed:
    """Gives an answer the client's name for it, in the place of Baton's own.

    The own one is random, so that nothing else in an answer can be taken for it.
    """

    def __init__(self, own: str, client_id: str) -> None:
        self._own = own
        self._for_client = json.dumps(client_id or own)[1:-1]

    def __call__(self, item: Item) -> Item:
        match item:
            case str():
                return item.replace(self._own, self._for_client)
            case WholeAnswer():
                content = item.content.replace(self._own.encode(), self._for_client.encode())
                return replace(item, content=content)
            case Refusal():
                return item
