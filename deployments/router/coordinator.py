"""The coordinator: takes requests in, and carries each of their prompts through its hand-off."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from deployments.errors import (
    AnswerUnreadable,
    NoReplica,
    Overloaded,
    ReplicaLost,
    ServiceUnavailable,
)
from deployments.router.admission import UNBOUNDED, Admission, Place
from deployments.router.passage import Passage
from deployments.router.replica_client import ReplicaClient
from deployments.router.request_state import RetryPolicy
from deployments.router.router_event import RouterEvent
from deployments.streams.generation import GenerationRequest, WholeAnswer
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
        self._passage = Passage(client, policy, count)

    async def run(
        self, request: GenerationRequest, *, bypass: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Yields what the client gets: one response, or server-sent events, framed.

        Closing the iterator, or cancelling the task that consumes it, aborts both engines and
        frees the blocks.

        Args:
            bypass: skip prefill; decode computes all prompts itself.

        Raises:
            Overloaded: it was not let in; no replica saw it.
            ServiceUnavailable: no replica could serve it; nothing was sent.
        """
        try:
            place = self._admission.enter(time.monotonic(), prefill=not bypass)
        except Overloaded:
            self._count(RouterEvent.REFUSED)
            raise
        try:
            parts = [request] if bypass else split(request)
            if len(parts) == 1:
                items = self._passage.run(request, place, bypass=bypass)
            else:
                items = self._several(request, parts, place)
            async with aclosing(items):
                async for item in items:
                    yield item
        finally:
            place.leave()

    async def drain(self) -> None:
        """Waits until all notices to owners are through."""
        await self._passage.drain()

    # ------------------------------------------------------------------------------------------

    async def _several(
        self, request: GenerationRequest, parts: list[GenerationRequest], place: Place
    ) -> AsyncGenerator[Any, None]:
        """Runs every prompt by itself and merges what comes.

        What is wrong with one of them refuses all, as it would on one server: before any is
        computed, and before a stream begins.
        """
        refusal = await self._refusal(request)
        if refusal is not None:
            yield refusal
            return
        passages = [
            functools.partial(self._passage.run, part, place, bypass=False) for part in parts
        ]
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
                    elif isinstance(item, WholeAnswer) and item.status == 200:
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
            yield stream_error(error)
            return
        yield stream.end()

    async def _refusal(self, request: GenerationRequest) -> Any | None:
        try:
            return await self._client.check(request.named(uuid.uuid4().hex))
        except (NoReplica, ReplicaLost) as error:
            logger.warning("%s; the prompts were not checked beforehand", error)
            return None
