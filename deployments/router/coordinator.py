"""The coordinator: takes requests in, and carries each of their prompts through its hand-off."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deployments.errors import (
    AnswerUnreadable,
    NoReplica,
    Overloaded,
    ReplicaLost,
    ServiceUnavailable,
)
from deployments.router.admission import UNBOUNDED, Admission, Place
from deployments.router.notices import Notices
from deployments.router.passage import Passage, Surroundings
from deployments.router.replica_client import ReplicaClient
from deployments.router.request_state import RetryPolicy
from deployments.router.router_event import RouterEvent
from deployments.router.trials import Trials
from deployments.streams.answer import Complete, Item, Refusal, WholeAnswer, is_refusal
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import GenerationRequest
from deployments.streams.interleave import interleaved
from deployments.streams.merging import MergedStream, merged_answer
from deployments.streams.prompts import samples_of, split
from deployments.streams.stream_errors import refused_stream, stream_error

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

PROMPTS_AT_ONCE = 16


class Coordinator:
    """Runs requests through prefill and decode.

    Args:
        client: calls replicas.
        policy: retry budget of every prompt.
        admission: who is let in; without one, everybody.
        count: told of every :class:`RouterEvent`.
        prompts_at_once: how many of one request's prompts are under way at the same time.
    """

    def __init__(
        self,
        client: ReplicaClient,
        policy: RetryPolicy,
        admission: Admission | None = None,
        count: Callable[[RouterEvent], None] = lambda event: None,
        *,
        prompts_at_once: int = PROMPTS_AT_ONCE,
    ) -> None:
        self._count = count
        self._client = client
        self._admission = admission or Admission(UNBOUNDED)
        self._prompts_at_once = prompts_at_once
        self._notices = Notices(client)
        trials = Trials(client, time.monotonic)
        self._surroundings = Surroundings(client, policy, trials, self._notices, count)

    async def answer(
        self, request: GenerationRequest, *, bypass: bool = False
    ) -> WholeAnswer | Refusal | EventStream:
        """What the client gets: at once when it is complete or when a stream has begun.

        Cancelling the call, or closing the stream, aborts both engines and frees the blocks.

        Args:
            bypass: skip prefill; decode computes all prompts itself.

        Raises:
            Overloaded: it was not let in; no replica saw it.
            ServiceUnavailable: no replica could serve it.
        """
        items = self._items(request, bypass=bypass)
        first = await anext(items, None)
        match first:
            case None:
                raise ServiceUnavailable("no replica gave an answer")
            case str():
                return EventStream(first, items)
            case _:
                async for more in items:
                    logger.error("a complete answer was followed by more: %r", more)
                return first

    async def drain(self) -> None:
        """Waits until all notices to owners are through."""
        await self._notices.drain()

    # ------------------------------------------------------------------------------------------

    async def _items(
        self, request: GenerationRequest, *, bypass: bool
    ) -> AsyncGenerator[Item, None]:
        try:
            place = self._admission.enter(time.monotonic(), prefill=not bypass)
        except Overloaded:
            self._count(RouterEvent.REFUSED)
            raise
        try:
            parts = [request] if bypass else split(request)
            if len(parts) == 1:
                items = self._passage(request, place, bypass=bypass)
            else:
                items = self._several(request, parts, place)
            async with aclosing(items):
                async for item in items:
                    yield item
        finally:
            place.leave()

    def _passage(
        self, request: GenerationRequest, place: Place, *, bypass: bool = False
    ) -> AsyncGenerator[Item, None]:
        return Passage(request, place, self._surroundings, bypass=bypass).items()

    async def _several(
        self, request: GenerationRequest, parts: list[GenerationRequest], place: Place
    ) -> AsyncGenerator[Item, None]:
        """Runs every prompt by itself and merges what comes.

        What is wrong with one of them refuses all, as it would on one server: before any is
        computed, and before a stream begins.
        """
        refusal = await self._refusal(request)
        if refusal is not None:
            yield refusal
            return
        passages = [functools.partial(self._passage, part, place) for part in parts]
        answers: dict[int, bytes] = {}
        stream = MergedStream(samples_of(getattr(request.body, "n", None)))
        streaming = False
        items = interleaved(passages, self._prompts_at_once)
        try:
            async with aclosing(items):
                async for prompt, item in items:
                    if isinstance(item, str):
                        events = stream.take(prompt, item)
                        streaming = True
                        if events:
                            yield events
                        if stream.failed:
                            break
                    elif isinstance(item, WholeAnswer) and not is_refusal(item):
                        answers[prompt] = item.content
                    else:
                        yield refused_stream(item) if streaming else item
                        return
            if not streaming:
                yield WholeAnswer(merged_answer([answers[n] for n in range(len(parts))]))
                return
        except (ServiceUnavailable, AnswerUnreadable) as error:
            if not streaming:
                raise ServiceUnavailable(str(error)) from error
            self._count(RouterEvent.STREAM_BROKEN)
            yield stream_error(Refusal(str(error)))
            return
        yield stream.end()

    async def _refusal(self, request: GenerationRequest) -> Complete | None:
        try:
            return await self._client.check(request.named(uuid.uuid4().hex))
        except (NoReplica, ReplicaLost) as error:
            logger.warning("%s; the prompts were not checked beforehand", error)
            return None
