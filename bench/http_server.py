"""Starts a program that serves HTTP, waits until it can, and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.transfer.processes import die_with_parent

_START_TIMEOUT_S: Final = 280.0
_END_TIMEOUT_S: Final = 60.0
_LOG_TAIL: Final = 6000


class HttpServer:
    """A program and all that it starts in its process group, from enter to exit.

    Args:
        command: listens on ``port`` of loopback and answers 200 at ``/health`` once it can serve.
        log: file that gets its output.
        environment: besides this process's own.

    Raises:
        RuntimeError: on enter, if it ends, or cannot serve within 280 s; has the end of the log.
    """

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.port = port
        self._command = command
        self._log = log
        self._environment = environment

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._is_healthy():
                return self
            time.sleep(0.5)
        self._end()
        raise RuntimeError(f"it did not start:\n{self._log.read_text()[-_LOG_TAIL:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=12) as got:
                return int(got.status) == 200
        except OSError:  # an HTTPError is one
            return False

    def _end(self) -> None:
        """Asks the program to end; what is left of its group then is killed."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
