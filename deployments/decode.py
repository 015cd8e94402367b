"""The decode server: fetches a prompt's KV blocks and generates from them."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.core.protocol import RawRequestInfo

from deployments.replica_router import RouteHint
from deployments.server import BatonServer
from transfer import faults


class DecodeServer(BatonServer):
    """Decodes; without a ticket, or when its read fails, computes the prompt itself.

    Its engine's connector is a ``kv_consumer``. Everything that is not a hand-off (tokenize,
    embeddings, score) is served here as :class:`~ray.serve.llm.deployment.LLMServer` does it.
    """

    async def decode(
        self,
        hint: RouteHint,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None = None,
    ) -> Any:
        """Generates; the ticket travels in ``request.kv_transfer_params``.

        Args:
            hint: for the router, not used here.
            method: ``chat`` or ``completions``.

        Returns:
            An async generator of what ``LLMServer.chat`` or ``.completions`` yields: one response,
            or lists of server-sent events.
        """
        await faults.reach_async("decode.accepted")
        return await getattr(self, method)(request, raw_request_info)
