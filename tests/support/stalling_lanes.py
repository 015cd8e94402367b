"""Makes RDMA reads stop, to catch one half-way without luck."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import pytest

from tests.support.stalling_proxy import StallingProxy
from transfer.transports.rdma.queue_pair import Lane


class StallingLanes:
    """Once ``limit_bytes`` have arrived, no further arrival is noticed until :meth:`resume`.

    The device cannot be held up itself; but what it wrote counts only once it was noticed.

    Args:
        control: where the owner takes control messages; they go through a proxy that :meth:`cut`
            and :meth:`close` end.
    """

    def __init__(self, control: str, limit_bytes: int) -> None:
        self._patch = pytest.MonkeyPatch()
        self._proxy = StallingProxy(control, limit_bytes)
        self._lock = threading.Lock()
        self._left_bytes = limit_bytes
        self._stalled = True
        reap = Lane.reap

        def slowly(lane: Lane) -> tuple[int, int]:
            with self._lock:
                if self._stalled and self._left_bytes <= 0:
                    return 0, 0
            moved, status = reap(lane)
            with self._lock:
                self._left_bytes -= moved
            return moved, status

        self._patch.setattr(Lane, "reap", slowly)
        self.address = self._proxy.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def resume(self) -> None:
        """Notice everything from now on."""
        self._stalled = False
        self._proxy.resume()

    def cut(self) -> None:
        """Cut the control connections there are now."""
        self._proxy.cut()

    def close(self) -> None:
        """Cut control for good."""
        self._stalled = False
        self._proxy.close()
        self._patch.undo()
