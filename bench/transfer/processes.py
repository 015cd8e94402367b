"""Child processes: started with a log of their own, paused between turns, killed by their pid."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_COMPLAINT = re.compile(r"^(E\d{4} |W\d{4} |.*\b(ERROR|WARN|Error|error|rejection)\b)")
_MAX_REASON = 300

_libc = ctypes.CDLL(None, use_errno=True)


class ChildFailed(Exception):
    """A child answered with an error, or not at all."""


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel kills the child when the runner is gone."""
    # Also when it is paused, which an end of its standard input would not reach.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One process."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **environment},
                preexec_fn=die_with_parent,
            )
        self._pending = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ask(self, what: str, timeout_s: float, **arguments: Any) -> Any:
        """The answer to one command; see :mod:`bench.transfer.worker`.

        Raises:
            ChildFailed: it is an error, the child ended, or there is none within ``timeout_s``.
        """
        self.tell(what, **arguments)
        return self.answer(what, timeout_s)

    def tell(self, what: str, **arguments: Any) -> None:
        """Send a command whose answer :meth:`answer` takes."""
        assert self._process.stdin is not None
        line = json.dumps({"do": what, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ChildFailed(self._ending(what)) from error

    def answer(self, what: str, timeout_s: float) -> Any:
        answer = json.loads(self._line(what, timeout_s))
        if "error" in answer:
            raise ChildFailed(self._with_complaint(answer["error"]))
        return answer["ok"]

    def kill(self) -> None:
        """End it, whatever it does. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def end(self, timeout_s: float) -> None:
        """Let it end by itself, then :meth:`kill`."""
        try:
            self.ask("close", timeout_s)
        except ChildFailed as error:
            print(f"{self._log.stem} did not close: {error}", file=sys.stderr)
        self.kill()

    def _line(self, what: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                self.kill()
                raise ChildFailed(self._with_complaint(f"{what}: no answer in {timeout_s:.0f} s"))
            some = os.read(self._process.stdout.fileno(), 1 << 16)
            if not some:
                raise ChildFailed(self._ending(what))
            self._pending += some
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _ending(self, what: str) -> str:
        self._process.wait()
        return self._with_complaint(f"{what}: the process ended with {self._process.returncode}")

    def _with_complaint(self, reason: str) -> str:
        """``reason``, and the last line of the log that looks like one."""
        lines = self._log.read_text(errors="replace").splitlines()[-50:]
        for line in reversed(lines):
            if _COMPLAINT.match(line) and reason not in line:
                return f"{reason} (log: {line.strip()})"[:_MAX_REASON]
        return reason[:_MAX_REASON]
