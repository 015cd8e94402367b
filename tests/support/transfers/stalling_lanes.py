"""Makes RDMA reads stop, to catch one half-way without luck."""

from __future__ import annotations

import threading

import pytest

from tests.support.network.stalling_proxy import StallingProxy
from transfer.transports.rdma.lane import Lane


class StallingLanes(StallingProxy):
    """Once ``limit_bytes`` have arrived, no further arrival is noticed until :meth:`resume`.

    The device cannot be held up itself; but what it wrote counts only once it was noticed.

    Args:
        target: where the owner takes control messages; they go through this proxy.
    """

    def __init__(self, target: str, limit_bytes: int) -> None:
        super().__init__(target, limit_bytes)
        self._lock = threading.Lock()
        self._left_to_notice = limit_bytes
        self._patch = pytest.MonkeyPatch()
        reap = Lane.reap

        def slowly(lane: Lane) -> tuple[int, int]:
            with self._lock:
                if self._stalled and self._left_to_notice <= 0:
                    return 0, 0
            moved, status = reap(lane)
            with self._lock:
                self._left_to_notice -= moved
            return moved, status

        self._patch.setattr(Lane, "reap", slowly)

    def close(self) -> None:
        """Cut control for good; what arrives is noticed."""
        super().close()
        self._patch.undo()
