"""The decode server: fetches a prompt's KV blocks and generates from them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from deployments.ray_internals.models import ErrorResponse
from deployments.replicas.owner_breaker import BreakerPolicy, OwnerBreakers
from deployments.replicas.request_faults import as_refusal
from deployments.replicas.resumption import SENT_TOKEN_IDS
from deployments.replicas.server import BatonServer, own_replica_id, require_alive
from deployments.route_hint import RouteHint
from deployments.streams.answer import WholeAnswer
from deployments.streams.continuation import StreamParts
from deployments.streams.framing import tells_error
from deployments.streams.generation import GenerationRequest, Output
from transfer import faults
from transfer.ticket import UnreadableTicket, read_ticket

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


class DecodeServer(BatonServer):
    """Decodes; without a ticket, or when its read fails, computes the prompt itself.

    Its engine's connector is a ``kv_consumer``. Everything that is not a hand-off (tokenize,
    embeddings, score) is served here as :class:`~ray.serve.llm.deployment.LLMServer` does it.
    """

    async def __init__(  # type: ignore[misc]
        self, llm_config: Any, *, breakers: BreakerPolicy, **kwargs: Any
    ) -> None:
        self._breakers = OwnerBreakers(breakers)
        await super().__init__(llm_config, **kwargs)

    def take_statuses(self, statuses: list[dict[str, Any]], now: float) -> None:
        super().take_statuses(statuses, now)
        for owner in self._breakers.take(statuses, now):
            logger.warning(
                "reads from engine %s fail again and again; its prompts are computed here", owner
            )

    async def decode(
        self, hint: RouteHint, request: GenerationRequest
    ) -> AsyncGenerator[Output, None]:
        """Generates; the ticket travels in ``request.body.kv_transfer_params``.

        Args:
            hint: for the router, not used here.

        Raises:
            EngineGone: the engine was dead before.
            EngineDeadError: the engine died; also in mid-stream.
            ContinuationMismatch: this engine does not go on where another one was.
        """
        require_alive(self.engine)
        await faults.reach_async("decode.accepted", request.body.user or "")
        replica_id = own_replica_id()
        if request.body.kv_transfer_params is not None and not self._is_read(request):
            # Before the engine hears of it: the router tells the owner at once.
            yield Output("", replica_id, unread=True)
            request = request.with_ticket(None)
        parts = None
        if request.sent is not None:
            parts = StreamParts(request.method, request.sent, replica_id)
            request = _telling_tokens(request)
        async with aclosing(await getattr(self, request.method)(request.body, request.http)) as out:
            async for content in _unbatched(out):
                await faults.reach_async("decode.streaming")
                if isinstance(content, str) and tells_error(content):
                    # vLLM tells clients of its engine's death; here another one may go on.
                    await self.engine.check_health()
                if isinstance(content, ErrorResponse):
                    yield Output(as_refusal(content), replica_id)
                elif not isinstance(content, str):
                    yield Output(WholeAnswer(content.model_dump_json().encode()), replica_id)
                elif parts is None:
                    yield Output(content, replica_id)
                elif (part := parts.take(content)) is not None:
                    yield part
        if parts is not None and (end := parts.end()) is not None:
            yield end

    def _is_read(self, request: GenerationRequest) -> bool:
        """Whether the engine gets the request's ticket."""
        ticket = read_ticket(request.body.kv_transfer_params)
        if isinstance(ticket, UnreadableTicket):
            logger.warning(
                "ticket of request %s refused: %s", request.body.request_id, ticket.fault
            )
            return False
        return self._breakers.may_read(ticket.engine_id, time.monotonic())


async def _unbatched(batches: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    async for batch in batches:
        for content in batch if isinstance(batch, list) else [batch]:
            yield content


def _telling_tokens(request: GenerationRequest) -> GenerationRequest:
    """The request with what the engine needs to go on, and with token ids in its events."""
    body = request.body
    params = body.kv_transfer_params
    if request.sent is not None and request.sent.token_ids:
        params = {**(params or {}), SENT_TOKEN_IDS: list(request.sent.token_ids)}
    update = {"kv_transfer_params": params, "return_token_ids": True}
    return replace(request, body=body.model_copy(update=update))
