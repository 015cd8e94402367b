"""What prefill and decode servers have in common."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import ray
from ray import serve
from ray.serve.llm.deployment import LLMServer
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.background import Background
from deployments.errors import EngineGone
from deployments.replicas.health import EngineHealth
from deployments.route_hint import RouteHint
from deployments.streams.answer import Refusal
from deployments.streams.generation import GenerationRequest

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

STATUS_TIMEOUT_S = 30.0
WATCH_PERIOD_S = 1.0
DRAIN_POLL_S = 0.1


class BatonServer(LLMServer):
    """A replica that runs one vLLM engine with :class:`~transfer.connector.BatonConnector`."""

    def _get_default_engine_class(self) -> Any:
        from deployments.replicas.engine import BatonEngine

        return BatonEngine

    # Serve awaits a constructor that is a coroutine; typing knows no such thing.
    async def __init__(  # type: ignore[misc]
        self, llm_config: Any, *, engine_timeout_s: float, **kwargs: Any
    ) -> None:
        # Where the engine's processes say they are: the address by which Ray knows this node.
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        self._background = Background()
        await super().__init__(llm_config, **kwargs)
        self._health = EngineHealth(engine_timeout_s, time.monotonic())
        self._watching = self._background.start("watching the engine", self._watch_engine())

    async def __del__(self) -> None:
        """Serve calls this when all requests have ended, before it ends the process.

        Blocks that are still offered stay for their readers, until ``drain_timeout_s`` is over and
        Serve ends the process all the same.
        """
        watching = getattr(self, "_watching", None)
        if watching is not None:
            watching.cancel()
            await until_nothing_is_offered(self.engine)
        await super().__del__()

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

    async def check_request(self, hint: RouteHint, request: GenerationRequest) -> Refusal | None:
        """Why this engine would refuse a request; None if it would not. Computes nothing."""
        await self._maybe_resolve_lora_from_multiplex()
        refused: Refusal | None = await self.engine.check(request)
        return refused

    async def ready(self, hint: RouteHint) -> str:
        """Answers with the replica's id if it can really serve, raises otherwise."""
        await self.check_health()
        return own_replica_id()

    def take_statuses(self, statuses: list[dict[str, Any]], now: float) -> None:
        """Takes what the ranks of the engine tell of themselves every second."""
        self._health.take(statuses, now)

    async def check_health(self) -> None:
        """Fails when the engine is dead, does not answer, or cannot hand anything over."""
        await super().check_health()
        self._health.require(time.monotonic())

    async def _watch_engine(self) -> None:
        """Asks the engine again and again; ends when it is dead."""
        try:
            while True:
                self.take_statuses(await self.engine.transfer_status(), time.monotonic())
                await asyncio.sleep(WATCH_PERIOD_S)
        except EngineDeadError as dead:
            logger.error("the engine is dead: %s", dead)


def own_replica_id() -> str:
    """Serve's id of the replica this runs in."""
    return str(serve.get_replica_context().replica_id.unique_id)


def require_alive(engine: Any) -> None:
    """Raises EngineGone: it is dead already, and no request that comes now is to blame."""
    if engine.is_dead:
        raise EngineGone("its engine died before")


async def until_nothing_is_offered(engine: Any) -> None:
    """Waits until an engine's offers are read, given up or expired, or the engine is dead."""
    try:
        while any(status["offers"] for status in await engine.transfer_status()):  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
    except EngineDeadError:
        logger.warning("the engine died while its readers were waited for")
