"""Tells owners of hand-offs that will not be read."""

from __future__ import annotations

import logging

from deployments.background import Background
from deployments.errors import NoReplica, ReplicaLost
from deployments.router.replica_client import ReplicaClient
from transfer.ticket import Ticket, UnreadableTicket

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


class Notices:
    """Notices to owners, under way in the background. All from one event loop.

    Args:
        client: calls replicas.
    """

    def __init__(self, client: ReplicaClient) -> None:
        self._client = client
        self._background = Background()

    def give_up(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> None:
        """Has an owner told that a hand-off, which has an id, will not be read."""
        self._background.start("giving up a hand-off", self._give_up(replica_id, ticket))

    async def drain(self) -> None:
        """Waits until all are through."""
        await self._background.drain()

    async def _give_up(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> None:
        name = ticket.handoff_id
        try:
            pinned = await self._client.abort(replica_id, ticket)
        except (NoReplica, ReplicaLost) as gone:
            logger.info("hand-off %s not given up: %s", name, gone)
        else:
            logger.info("gave up hand-off %s: %d were pinned", name, pinned)
