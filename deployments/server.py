"""What prefill and decode servers have in common."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray import serve
from ray.serve.llm.deployment import LLMServer

from deployments.health import require_healthy
from deployments.route_hint import RouteHint

STATUS_TIMEOUT_S = 30.0


class BatonServer(LLMServer):
    """A replica that runs one vLLM engine with :class:`~transfer.connector.BatonConnector`."""

    def _get_default_engine_class(self) -> Any:
        from deployments.engine import BatonEngine

        return BatonEngine

    # Serve awaits a constructor that is a coroutine; typing knows no such thing.
    async def __init__(self, llm_config: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        # Where the engine's processes say they are: the address by which Ray knows this node.
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        await super().__init__(llm_config, **kwargs)

    async def status(self, hint: RouteHint) -> list[dict[str, Any]]:
        """Transfer status of every rank of this replica's engine; see ``WorkerControl``."""
        statuses: list[dict[str, Any]] = await asyncio.wait_for(
            self.engine.transfer_status(), timeout=STATUS_TIMEOUT_S
        )
        replica = {
            "replica_id": own_replica_id(),
            "replica_pid": os.getpid(),
            "unfinished_requests": self.engine.unfinished_requests(),
        }
        return [{**status, **replica} for status in statuses]

    async def ready(self, hint: RouteHint) -> str:
        """Answers with the replica's id if it can really serve, raises otherwise."""
        await self.check_health()
        return own_replica_id()

    async def check_health(self) -> None:
        """Fails when the engine is dead, or its transfer engine is."""
        await super().check_health()
        if self.engine is not None:
            require_healthy(
                await asyncio.wait_for(self.engine.transfer_status(), timeout=STATUS_TIMEOUT_S)
            )


def own_replica_id() -> str:
    """Serve's id of the replica this runs in."""
    return str(serve.get_replica_context().replica_id.unique_id)
