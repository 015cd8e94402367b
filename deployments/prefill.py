"""The prefill server: computes prompts and offers their KV blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from deployments.replica_router import RouteHint
from deployments.server import BatonServer, own_replica_id
from transfer import faults


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """A prefill replica's answer.

    Attributes:
        replica_id: who holds the blocks.
        tickets: one per prompt, as JSON objects; fewer if a prompt left none.
        error: the reason why the request was refused, in OpenAI's form.
    """

    replica_id: str
    tickets: tuple[dict[str, Any], ...] = ()
    error: ErrorResponse | None = None


class PrefillServer(BatonServer):
    """Only prefills. Its engine's connector is a ``kv_producer``."""

    async def prefill(
        self,
        hint: RouteHint,
        method: str,
        request: Any,
        raw_request_info: RawRequestInfo | None = None,
    ) -> PrefillAnswer:
        """Computes the request's prompts; their blocks stay pinned until read or given up.

        Args:
            hint: for the router, not used here.
            method: ``chat`` or ``completions``.
        """
        await self._maybe_add_request_id_to_request(request)
        await self._maybe_resolve_lora_from_multiplex()
        await faults.reach_async("prefill.computing")
        done = await self.engine.prefill(method, request, raw_request_info)
        await faults.reach_async("prefill.answering")
        return PrefillAnswer(own_replica_id(), done.tickets, done.error)

    async def abort_handoffs(self, hint: RouteHint, handoff_ids: list[str]) -> int:
        """Lets go of blocks that nobody will read; returns how many offers were still pinned."""
        return int(await self.engine.abort_handoffs(handoff_ids))
