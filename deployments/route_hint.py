"""What a caller tells the request router about replicas.

Apart from the router, because Serve pickles the module of a router class by value: in the process
that routes, classes of that module are other ones than those that the callers import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RouteHint:
    """What the caller knows of replicas.

    Attributes:
        exclude: replicas that failed this request already.
        only: the one replica that will do (it holds the blocks), or None.
        until_s: when its caller stops waiting for a replica, in the time of ``time.monotonic``.
        offered: the router's answer: replicas that it had to choose from, whether or not one of
            them took the call.
    """

    exclude: frozenset[str] = frozenset()
    only: str | None = None
    until_s: float = math.inf
    offered: set[str] = field(default_factory=set, compare=False)

    @property
    def admits_all(self) -> bool:
        """Whether any replica may get the call."""
        return self.only is None and not self.exclude

    def admits(self, replica_id: str) -> bool:
        """Whether a replica may get the call."""
        return replica_id == self.only if self.only is not None else replica_id not in self.exclude
