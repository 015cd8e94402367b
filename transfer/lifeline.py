"""Ties this process's life to its parent's.

vLLM's engine processes are known to outlive a parent that was killed, and then spin on a core.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading

logger = logging.getLogger(__name__)

_started = threading.Lock()


def die_with_parent() -> None:
    """Kills this process with SIGKILL as soon as its present parent has ended.

    A thread sleeps on the parent's pidfd (Linux 5.3), so waiting costs nothing and a parent that
    only ends a thread does not count as gone. Safe to call more than once.
    """
    if not _started.acquire(blocking=False):
        return
    parent = os.getppid()
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch() -> None:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll()
        logger.error("parent process %d ended, ending too", parent)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="baton-lifeline", daemon=True).start()
