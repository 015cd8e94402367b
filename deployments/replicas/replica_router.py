"""Which replica gets a call: the least loaded one that the caller does not rule out.

Serve's routers know load but not what happened to this request before. Every call of Baton between
replicas therefore carries a :class:`~deployments.route_hint.RouteHint` as its first
argument, which this router reads.
"""

from __future__ import annotations

import random
import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.route_hint import RouteHint


class HintedRouter(RequestRouter):
    """Serve's request router that honours :class:`RouteHint`.

    Serve itself then picks the shortest queue among the candidates; equals come in random order.
    It is not first-in-first-out by design: a replica chosen for one request's hint may be the
    wrong one for another's.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank: all admitted replicas. An empty answer makes Serve wait and ask again."""
        hint = RouteHint()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            if pending_request.args and isinstance(pending_request.args[0], RouteHint):
                hint = pending_request.args[0]
            if time.monotonic() > hint.until_s:
                # Serve goes on for callers that are gone. What can never be had would keep one of
                # its few routing tasks for ever.
                pending_request.future.cancel()
                return []
        admitted = [
            replica for replica in candidate_replicas if hint.admits(replica.replica_id.unique_id)
        ]
        hint.offered.update(replica.replica_id.unique_id for replica in admitted)
        random.shuffle(admitted)
        return [admitted] if admitted else []
