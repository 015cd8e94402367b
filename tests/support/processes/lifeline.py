"""Ties a program that a test starts, and all that it starts in turn, to the test's process.

Run as a script, ``... PARENT COMMAND``, this file forks a guard and becomes the command. The guard
sleeps on the pidfds of both: once either has ended, however it did, it kills the process group.
Stock vLLM needs this: an engine process that lost its API server stays and spins on a core.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def start_tied(
    command: Sequence[str],
    output: IO[bytes],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a program that leads a process group of its own.

    The group is killed as soon as the program or this process has ended; the thread that calls may
    end before. A process that leaves the group lives on: the program itself has to end it.

    Args:
        output: file that gets what the program prints.
        environment: besides this process's own.
        folder: where the program runs; here if None.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _become(parent: int, command: list[str]) -> None:
    ends = select.poll()
    for pid in (parent, os.getpid()):
        ends.register(os.pidfd_open(pid), select.POLLIN)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    if os.fork() == 0:
        ends.poll()
        os.killpg(0, signal.SIGKILL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
