"""The prefill server: computes prompts and offers their KV blocks."""

from __future__ import annotations

from deployments.replicas.server import BatonServer, own_replica_id, require_alive
from deployments.route_hint import RouteHint
from deployments.streams.answer import Refusal
from deployments.streams.generation import GenerationRequest, PrefillAnswer
from transfer import faults


class PrefillServer(BatonServer):
    """Only prefills. Its engine's connector is a ``kv_producer``."""

    async def prefill(
        self, hint: RouteHint, request: GenerationRequest, handoff_id: str
    ) -> PrefillAnswer:
        """Computes the request's prompt; its blocks stay pinned until read or given up.

        Args:
            hint: for the router, not used here.
            handoff_id: names the hand-off, so that it can be given up without its ticket.

        Raises:
            EngineGone: the engine was dead before.
            EngineDeadError: it died.
        """
        require_alive(self.engine)
        await self._maybe_add_request_id_to_request(request.body)
        await self._maybe_resolve_lora_from_multiplex()
        await faults.reach_async("prefill.computing", request.body.user or "")
        done = await self.engine.prefill(request, handoff_id)
        if isinstance(done, Refusal):
            return PrefillAnswer(own_replica_id(), error=done)
        return PrefillAnswer(own_replica_id(), done)

    async def abort_handoffs(self, hint: RouteHint, handoff_ids: list[str]) -> int:
        """Lets go of blocks that nobody will read; returns how many offers were still pinned."""
        return int(await self.engine.abort_handoffs(handoff_ids))
