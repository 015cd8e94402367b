"""The decode server: fetches a prompt's KV blocks and generates from them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

from deployments.generation import GenerationRequest, Output
from deployments.replica_router import RouteHint
from deployments.server import BatonServer, own_replica_id
from transfer import faults


class DecodeServer(BatonServer):
    """Decodes; without a ticket, or when its read fails, computes the prompt itself.

    Its engine's connector is a ``kv_consumer``. Everything that is not a hand-off (tokenize,
    embeddings, score) is served here as :class:`~ray.serve.llm.deployment.LLMServer` does it.
    """

    async def decode(
        self, hint: RouteHint, request: GenerationRequest
    ) -> AsyncGenerator[Output, None]:
        """Generates; the ticket travels in ``request.body.kv_transfer_params``.

        Args:
            hint: for the router, not used here.
        """
        await faults.reach_async("decode.accepted")
        async for batch in await getattr(self, request.method)(request.body, request.http):
            for content in batch if isinstance(batch, list) else [batch]:
                yield Output(content, own_replica_id(), refused=isinstance(content, ErrorResponse))
