"""The coordinator: carries out what the hand-off's state machine says, one request at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from deployments.background import Background
from deployments.errors import NoReplica, ReplicaLost, ServiceUnavailable
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
)
from transfer import faults
from transfer.params import tickets_to_params

if TYPE_CHECKING:
    # Ray and vLLM stay out of a process that calls replicas otherwise than by Serve handles.
    from ray.llm._internal.serve.core.protocol import RawRequestInfo

    from deployments.prefill import PrefillAnswer
    from deployments.replica import DecodeCall

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


class Caller(Protocol):
    """What calls replicas: :class:`~deployments.replica.ReplicaCaller` does it through Serve."""

    async def prefill(
        self,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None,
        exclude: frozenset[str],
    ) -> PrefillAnswer: ...

    def decode(
        self,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None,
        exclude: frozenset[str],
        calls: list[DecodeCall],
    ) -> AsyncGenerator[Any, None]: ...

    def refusal(self, chunk: Any) -> Any | None:
        """The error, if that is what a first chunk is: the request itself was refused."""
        ...

    async def abort(self, replica_id: str, handoff_ids: tuple[str, ...]) -> int: ...


class Coordinator:
    """Runs requests through prefill and decode.

    Args:
        caller: calls replicas.
        policy: retry budget of every request.
    """

    def __init__(self, caller: Caller, policy: RetryPolicy) -> None:
        self._caller = caller
        self._policy = policy
        self._background = Background()

    async def run(
        self,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None,
        *,
        bypass: bool = False,
    ) -> AsyncGenerator[Any, None]:
        """Yields what the decode replica yields: one response, or lists of events.

        Closing the iterator, or cancelling the task that consumes it, aborts both engines and
        frees the blocks.

        Args:
            method: ``chat`` or ``completions``.
            bypass: skip prefill; decode computes the prompt itself.

        Raises:
            ServiceUnavailable: no replica could serve it; nothing was sent.
        """
        handoff = Handoff(self._policy, random.random)
        try:
            instructions = handoff.on(Start(bypass))
            while instructions:
                step = self._carry_out_notices(instructions)
                if step is None:
                    return
                await asyncio.sleep(getattr(step, "pause_s", 0.0))
                match step:
                    case CallPrefill():
                        instructions = await self._prefill(
                            handoff, step, method, request, raw_request_info
                        )
                    case CallDecode():
                        instructions = []
                        attempt = self._decode(handoff, step, method, request, raw_request_info)
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
                    case Answer():
                        yield _stream_error("the decode replica was lost while it answered")
                        return
        finally:
            self._carry_out_notices(handoff.on(ClientGone()))

    async def drain(self) -> None:
        """Waits until all notices to owners are through."""
        await self._background.drain()

    # ------------------------------------------------------------------------------------------

    async def _prefill(
        self,
        handoff: Handoff,
        step: CallPrefill,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None,
    ) -> list[Instruction]:
        try:
            answer = await self._caller.prefill(method, request, raw_request_info, step.exclude)
        except ReplicaLost as lost:
            logger.warning("%s; trying another", lost)
            return handoff.on(PrefillLost(lost.replica_id))
        except NoReplica as missing:
            logger.warning("%s; decode computes the prompt", missing)
            return handoff.on(PrefillLost(None))
        if answer.error is not None:
            return handoff.on(Refused(answer.error))
        return handoff.on(Prefilled(answer.replica_id, answer.tickets))

    async def _decode(
        self,
        handoff: Handoff,
        step: CallDecode,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None,
    ) -> AsyncGenerator[Any, None]:
        if step.tickets:
            await faults.reach_async("router.ticket")
        params = tickets_to_params(step.tickets)
        decode_request = request.model_copy(update={"kv_transfer_params": params})
        calls: list[DecodeCall] = []
        first = True
        chunks = self._caller.decode(method, decode_request, raw_request_info, step.exclude, calls)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if first and (error := self._caller.refusal(chunk)) is not None:
                        yield _Next(handoff.on(Refused(error)))
                        return
                    if first:
                        first = False
                        handoff.on(FirstChunk())
                    yield chunk
        except ReplicaLost as lost:
            logger.warning("%s%s", lost, "; trying another" if first else " in mid-stream")
            yield _Next(handoff.on(DecodeLost(lost.replica_id)))
            return
        except NoReplica as missing:
            logger.warning("%s", missing)
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


def _stream_error(message: str) -> str:
    """A final event in the form of OpenAI's streaming errors."""
    error = {"message": message, "type": "server_error", "param": None, "code": 503}
    return f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
