"""How much of requests' bodies one process takes in, and for how long it waits for them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class BodyRefused(Exception):
    """A body is not read on.

    Attributes:
        status: HTTP status that says so.
        retry_after_s: when the same request may come again; None: never as it is.
    """

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """The bounds of one process.

    Attributes:
        max_body_bytes: of one body.
        max_bytes_in_flight: of all bodies whose requests are not answered yet.
        timeout_s: from the end of a request's headers to the end of its body.
    """

    max_body_bytes: int
    max_bytes_in_flight: int
    timeout_s: float


class Bodies:
    """The bodies that are in one process now. Not thread-safe.

    What counts is what has come, not what was announced: an announcement costs a client nothing.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._bytes = 0

    @contextmanager
    def request(self) -> Iterator[Body]:
        """A request, from its first byte to its answer's last."""
        body = Body(self)
        try:
            yield body
        finally:
            self._bytes -= body.size

    def too_slow(self) -> BodyRefused:
        """The refusal of a body that did not come in time."""
        return BodyRefused(408, f"the body did not come within {self.limits.timeout_s:g} s")

    def _add(self, size: int) -> None:
        self._bytes += size

    def _require_room(self) -> None:
        if self._bytes > self.limits.max_bytes_in_flight:
            raise BodyRefused(
                429,
                f"the requests that are being served have {self.limits.max_bytes_in_flight} bytes "
                "of bodies, which is all that is allowed; come again later",
                retry_after_s=1,
            )


class Body:
    """One request's body while it comes.

    Args:
        bodies: all of them.
    """

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    def announced(self, size: int) -> None:
        """Takes the length that the headers tell.

        Raises:
            BodyRefused: it is too long, whatever comes.
        """
        if size > self._bodies.limits.max_body_bytes:
            raise BodyRefused(
                413, f"the body is longer than {self._bodies.limits.max_body_bytes} bytes"
            )

    def add(self, size: int) -> None:
        """Takes what has come.

        Raises:
            BodyRefused: it is one byte too many, of this body or of all.
        """
        self.size += size
        self._bodies._add(size)
        self.announced(self.size)
        self._bodies._require_room()
