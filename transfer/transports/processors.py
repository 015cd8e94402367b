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
from contextlib import contextmanager, suppress

# socket(7): the processor that handled the last packet, within a host the one that sent it.
_SO_INCOMING_CPU = 49


# Where fewer are moved, the way to another processor is too long.
_WORTH_BYTES = 2 << 20


@contextmanager
def apart(number: int, streams: int, size_bytes: int) -> Iterator[None]:
    """Keeps the thread that takes in stream ``number`` of a read away from those of the others.

    Args:
        streams: of the read; without effect where there are more processors.
        size_bytes: that this thread may have to move; without effect if they are few.
    """
    allowed = os.sched_getaffinity(0)
    with _kept_to(sorted(allowed)[number % len(allowed)], allowed, streams, size_bytes):
        yield


@contextmanager
def beside_peer(sock: socket.socket, streams: int, size_bytes: int) -> Iterator[None]:
    """As :func:`apart`, where the other end of a connection within the host ran last.

    Raises:
        OSError: the connection is gone.
    """
    there = sock.getsockopt(socket.SOL_SOCKET, _SO_INCOMING_CPU)
    with _kept_to(there, os.sched_getaffinity(0), streams, size_bytes):
        yield


@contextmanager
def _kept_to(processor: int, allowed: set[int], streams: int, size_bytes: int) -> Iterator[None]:
    scarce = 1 < len(allowed) <= streams
    if not scarce or processor not in allowed or size_bytes < _WORTH_BYTES:
        yield
        return
    _may_run_on({processor})
    try:
        yield
    finally:
        _may_run_on(allowed)


def _may_run_on(processors: set[int]) -> None:
    # Forbidden, or all of them were taken from this process meanwhile: then the kernel has chosen.
    with suppress(OSError):
        os.sched_setaffinity(0, processors)
