"""Which processors the threads of a read within a host run on.

What goes through a connection within a host is copied twice. Where both of its ends run on the same
processor, by turns, the second copy comes out of the cache and nobody has to wait until another
processor has woken up; apart they can take twice as long. A second processor makes up for that,
but where a read has as many streams as there are processors, there is none to spare. The scheduler
finds out by itself, but seldom within the milliseconds that a read takes.

Threads are kept on a processor only while they move bytes, and only where they may run anyway.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

# Where fewer are moved, the way to another processor is too long.
_WORTH_BYTES = 2 << 20


def apart(number: int, streams: int, size_bytes: int) -> AbstractContextManager[None]:
    """Keeps the thread that takes in stream ``number`` of a read away from those of the others.

    Args:
        streams: of the read; without effect where there are more processors.
        size_bytes: that this thread may have to move; without effect if they are few.
    """
    allowed = _scarce(streams, size_bytes)
    return _kept_to(allowed[number % len(allowed)], allowed) if allowed else nullcontext()


def beside_peer(sock: socket.socket, streams: int, size_bytes: int) -> AbstractContextManager[None]:
    """As :func:`apart`, where the other end of a connection within the host ran last.

    Without effect where the system does not say where that is.
    """
    allowed = _scarce(streams, size_bytes)
    return _kept_to(_last_seen(sock), allowed) if allowed else nullcontext()


def _scarce(streams: int, size_bytes: int) -> list[int]:
    """The processors that the thread may use; none where there are more than ``streams``."""
    if size_bytes < _WORTH_BYTES:
        return []
    allowed = sorted(os.sched_getaffinity(0))
    return allowed if 1 < len(allowed) <= streams else []


def _last_seen(sock: socket.socket) -> int:
    """Where the last packet was handled: within a host, the processor that it was sent from."""
    # Not every system that runs Linux programs has this option, socket(7). A connection that is
    # gone shows when it is used.
    with suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
    return -1


@contextmanager
def _kept_to(processor: int, allowed: list[int]) -> Iterator[None]:
    if processor not in allowed:
        yield
        return
    try:
        _may_run_on([processor])
        yield
    finally:
        _may_run_on(allowed)


def _may_run_on(processors: list[int]) -> None:
    # Forbidden, or all of them were taken from this process meanwhile: then the kernel has chosen.
    with suppress(OSError):
        os.sched_setaffinity(0, processors)
