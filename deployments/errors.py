"""Errors of the serving side, as the coordinator understands them."""

from __future__ import annotations

import math

from deployments.role import Role


class ReplicaLost(Exception):
    """The replica died, or its engine did, while it had our call.

    Args:
        role: the replica's.
        replica_id: Serve's id of the replica.
        cause: what Ray said, in one line.
        held: whether the engine may have had our call when it died; False: it was gone before, or
            is alive and only could not serve.
        alive_at: when it was found alive before the call, as ``time.monotonic`` has it, if that was
            asked: servers come back under their name.
    """

    def __init__(
        self,
        role: Role,
        replica_id: str,
        cause: str,
        *,
        held: bool = True,
        alive_at: float = -math.inf,
    ) -> None:
        super().__init__(f"{role} replica {replica_id} was lost: {cause}")
        self.replica_id = replica_id
        self.held = held
        self.alive_at = alive_at


class EngineGone(Exception):
    """A replica's engine was dead before a call came to it."""


class Condemned(Exception):
    """Engines died under requests of this content, as many as may."""


class NoReplica(Exception):
    """No replica of this role took the call in time."""

    def __init__(self, role: Role, waited_s: float) -> None:
        super().__init__(f"no {role} replica took the request within {waited_s:.1f} s")


class ServiceUnavailable(Exception):
    """The request cannot be served now; trying again later may help.

    Args:
        retry_after_s: a hint for the client, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ContinuationMismatch(Exception):
    """The stream that should go on does not begin with what the client has."""


class AnswerUnreadable(Exception):
    """What a replica answered is not what its API says."""


class Overloaded(Exception):
    """Too much is waiting already; nobody has worked on this request.

    Args:
        retry_after_s: when it may be let in, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = math.ceil(max(1.0, retry_after_s))
