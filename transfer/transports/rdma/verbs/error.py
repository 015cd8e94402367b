"""What fails when a device or the kernel refuses something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transfer.errors import Phase, TransportUnavailable


class VerbsError(OSError):
    """A verbs call failed; ``errno`` says how."""


@contextmanager
def unavailable(phase: Phase, peer: str) -> Iterator[None]:
    """Turn what devices and the kernel refuse into :class:`TransportUnavailable`."""
    try:
        yield
    except OSError as error:
        raise TransportUnavailable(
            f"rdma does not work: {error}", phase=phase, peer=peer
        ) from error
