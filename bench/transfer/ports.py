"""TCP ports of programs that are told theirs."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from pathlib import Path

from bench.transfer.processes import ChildFailed


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_listener(process: subprocess.Popen[bytes], port: int, timeout_s: float) -> None:
    """Until ``process`` listens on ``port``.

    Raises:
        ChildFailed: it ended, or does not in time.
    """
    listening = re.compile(rf":{port:04X} 0+:0000 0A")
    deadline = time.monotonic() + timeout_s
    # A connection would be taken for a client: ask the kernel instead.
    while not listening.search(Path("/proc/net/tcp").read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ChildFailed(f"the server does not listen on port {port}")
        time.sleep(0.02)
