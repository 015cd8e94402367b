"""Makes copies from other processes' memory crawl, to catch a read half-way without luck."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.network.stalling_proxy import StallingProxy
from transfer.transports import process_memory
from transfer.types import SpanArray

_CRAWL_BYTES = 16
_CRAWL_S = 0.005


class StallingMemory(StallingProxy):
    """After ``limit_bytes`` every call copies 16 bytes in 5 ms until :meth:`resume`.

    A real call cannot be held up either: it is only ever as long as its slice.

    Args:
        target: where the owner takes control messages; they go through this proxy.
    """

    def __init__(self, target: str, limit_bytes: int) -> None:
        super().__init__(target, limit_bytes)
        self._lock = threading.Lock()
        self._left_to_copy = limit_bytes
        self._copy = process_memory.read_process_memory
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(process_memory, "read_process_memory", self._slowly)

    def close(self) -> None:
        """Cut control for good; memory stays readable at full speed."""
        super().close()
        self._patch.undo()

    def _slowly(self, pid: int, local: SpanArray, remote: SpanArray) -> int:
        with self._lock:
            crawl = self._stalled and self._left_to_copy <= 0
        if crawl:
            time.sleep(_CRAWL_S)
            local, remote = local[:1].copy(), remote[:1].copy()
            local[0, 1] = remote[0, 1] = min(int(local[0, 1]), _CRAWL_BYTES)
        count = self._copy(pid, local, remote)
        with self._lock:
            self._left_to_copy -= count
        return count
