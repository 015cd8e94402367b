"""Which replica gets a call: the least loaded one that the caller does not rule out.

Serve's routers know load but not what happened to this request before. Every call of Baton between
replicas therefore carries a :class:`RouteHint` as its first argument, which this router reads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


@dataclass(frozen=True, slots=True)
class RouteHint:
    """What the caller knows of replicas.

    Attributes:
        exclude: replicas that failed this request already.
        only: the one replica that will do (it holds the blocks), or None.
    """

    exclude: frozenset[str] = frozenset()
    only: str | None = None

    def admits(self, replica_id: str) -> bool:
        """Whether a replica may get the call."""
        return replica_id == self.only if self.only is not None else replica_id not in self.exclude


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
        admitted = [
            replica for replica in candidate_replicas if hint.admits(replica.replica_id.unique_id)
        ]
        random.shuffle(admitted)
        return [admitted] if admitted else []
