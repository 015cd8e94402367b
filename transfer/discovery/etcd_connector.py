"""Connections to etcd, one after the other, to whichever member answers."""

from __future__ import annotations

import random

from transfer.discovery.etcd_client import EtcdClient
from transfer.discovery.settings import EtcdSettings

_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0


class EtcdConnector:
    """Makes connections for one thread: to the next member whenever one fails, with backoff."""

    def __init__(self, settings: EtcdSettings, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._endpoints = list(settings.parsed_endpoints)
        random.shuffle(self._endpoints)  # spreads the workers over the members
        self._failures = 0
        self._client: EtcdClient | None = None

    def client(self) -> EtcdClient:
        """The connection in use, or a new one; raises as :class:`EtcdClient` does."""
        client = self._client
        if client is None:
            client = self._client = EtcdClient(self._endpoints[0], self._settings, self._timeout_s)
        return client  # which close() may have forgotten meanwhile

    def succeeded(self) -> None:
        """The last call worked: the next failure starts from the shortest wait."""
        self._failures = 0

    def failed(self, *, same_endpoint: bool = False) -> float:
        """Drop the connection; the next is to another member.

        Returns:
            Seconds to wait first: none until every member was tried once.
        """
        self.close()
        self._failures += 1
        if not same_endpoint or self._failures > 1:
            self._endpoints.append(self._endpoints.pop(0))
        rounds, rest = divmod(self._failures, len(self._endpoints))
        if rest or (same_endpoint and self._failures == 1):
            return 0.0
        backoff_s = min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * 2.0 ** min(rounds - 1, 10))
        return backoff_s * random.uniform(0.75, 1.25)

    def close(self) -> None:
        """Close the connection, from any thread."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
