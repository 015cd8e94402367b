"""Ends of work requests, and how to be woken by them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from transfer.transports.rdma.verbs.binding import Binding
from transfer.transports.rdma.verbs.error import VerbsError

_EVENT_FILE = "anon_inode:[infinibandevent]"
_CHANNEL_TRIES = 16

_making_channel = threading.Lock()


class CompletionQueue:
    """Ends of work requests, and a descriptor that becomes readable when there are new ones.

    For one thread.
    """

    def __init__(self, binding: Binding, context: Any, entries: int, *, events: bool) -> None:
        self._binding = binding
        self._channel: Any = None
        self.fd = -1
        if events:
            self._channel, self.fd = _open_channel(binding, lambda: binding.cq.CompChannel(context))
        self.raw = binding.cq.CQ(context, entries, None, self._channel, 0)
        if events:
            self.raw.req_notify()

    def poll(self, limit: int) -> list[tuple[int, int]]:
        """Up to ``limit`` ends as (request id, status); does not wait."""
        with self._binding.translated("poll"):
            _, found = self.raw.poll(limit)
        return [(end.wr_id, end.status) for end in found]

    def rearm(self) -> None:
        """After ``fd`` became readable: take the event and ask for the next. Poll afterwards."""
        with self._binding.translated("take an event"):
            self._channel.get_cq_event(self.raw)
            self.raw.ack_events(1)
            self.raw.req_notify()

    def close(self) -> None:
        """After its queue pairs. Idempotent."""
        with self._binding.translated("close a completion queue"):
            self.raw.close()
            if self._channel is not None:
                self._channel.close()


def _open_channel(binding: Binding, make: Callable[[], Any]) -> tuple[Any, int]:
    """A completion channel and its descriptor, which the 44 build does not tell."""
    if hasattr(binding.cq.CompChannel, "fd"):
        channel = make()
        return channel, int(channel.fd)
    with _making_channel:
        for _ in range(_CHANNEL_TRIES):
            before = _event_files()
            channel = make()
            found = _event_files() - before
            if len(found) == 1:
                return channel, found.pop()
            # Another library of this process opened or closed one at the same moment.
            channel.close()
    raise VerbsError(0, "cannot tell which descriptor a completion channel has")


def _event_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _EVENT_FILE:
                found.add(int(name))
        except OSError:  # closed meanwhile
            continue
    return found
