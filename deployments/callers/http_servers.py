"""Which vLLM servers there are, and which one gets a call."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from deployments.role import Role
from transfer.types import WorkerRecord

_KV_ROLES: dict[Role, tuple[str, str]] = {
    "prefill": ("kv_producer", "kv_both"),
    "decode": ("kv_consumer", "kv_both"),
}


class Peers(Protocol):
    """The part of :class:`transfer.discovery.base.Discovery` that is used here."""

    def peers(self) -> tuple[WorkerRecord, ...]:
        """All records of the local view."""
        ...


class HttpServers:
    """The servers of both roles, by URL, and how many calls each has now.

    Not thread-safe.

    Args:
        named: URLs by role. A role that names none is found through ``discovery``.
        discovery: workers tell in their records where the server of their engine is.
    """

    def __init__(self, named: Mapping[Role, Sequence[str]], discovery: Peers | None) -> None:
        self._named = named
        self._discovery = discovery
        self._calls: Counter[str] = Counter()

    def urls(self, role: Role) -> list[str]:
        """All servers of one role."""
        if self._named[role]:
            return list(self._named[role])
        records = self._discovery.peers() if self._discovery is not None else ()
        return sorted(
            {record.http_url for record in records if record.role in _KV_ROLES[role]} - {""}
        )

    def pick(self, role: Role, exclude: Collection[str]) -> str | None:
        """The one with the fewest calls, equals by chance; None if all are in ``exclude``."""
        urls = [url for url in self.urls(role) if url not in exclude]
        return min(urls, key=lambda url: (self._calls[url], random.random()), default=None)

    @contextmanager
    def calling(self, url: str) -> Iterator[None]:
        """Counts a call while it lasts."""
        self._calls[url] += 1
        try:
            yield
        finally:
            self._calls[url] -= 1
            if not self._calls[url]:
                del self._calls[url]
