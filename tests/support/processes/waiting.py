"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SLOWNESS = 5 if os.environ.get("RDMA_VM") else 1
"""Time limits are so many times longer in the emulated machine of tests/rdma."""


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0 * SLOWNESS) -> bool:
    """Poll ``condition``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
