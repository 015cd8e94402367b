"""Starts processes one after the other, waits until each is ready, and watches them."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from serve_app.launch.parent_death import Keeper

_POLL_S: Final = 0.25
_LINE_EVERY_S: Final = 10.0
_TAIL_BYTES: Final = 16 << 10


class ServiceError(Exception):
    """A service did not come up, or ended; one line for the user.

    Attributes:
        log: where the service's own words are.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Service:
    """One program that must run.

    Attributes:
        command: program and arguments.
        env: its whole environment.
        log: file that takes what it prints.
        ready: asked several times a second; None when it is ready, else what it still waits for.
            Raises ServiceError when there is nothing left to hope for.
        timeout_s: longest wait for that.
        daemon: the command itself ends, with code 0, and leaves its processes running.
    """

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], str | None]
    timeout_s: float
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    daemon: bool = False


class Progress:
    """Says what is waited for and since when: one line rewritten on a terminal, else few lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._start_s = time.monotonic()
        self._last: tuple[str, float] = ("", 0.0)
        self._width = 0

    def waiting(self, what: str) -> None:
        """Call often; prints as seldom as makes sense."""
        elapsed_s = time.monotonic() - self._start_s
        said, said_s = self._last
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            line = f"  {elapsed_s:4.0f} s  waiting for {what}"[: columns - 1]
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._stream.flush()
            self._width = len(line)
        elif what != said or elapsed_s - said_s >= _LINE_EVERY_S:
            self._last = (what, elapsed_s)
            self._print(f"  {elapsed_s:4.0f} s  waiting for {what}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._print(line)

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class ServiceRunner:
    """Starts services and notices when one ends. Ending them is the keeper's business."""

    def __init__(self, keeper: Keeper, progress: Progress) -> None:
        self._keeper = keeper
        self._progress = progress
        self._running: dict[int, Service] = {}

    def start(self, service: Service) -> None:
        """Starts it and returns when it is ready.

        Raises:
            ServiceError: it ended, or took too long; or one started before has ended.
            Stopped: it is time to end.
        """
        deadline = time.monotonic() + service.timeout_s
        pid = _spawn(service)
        if not service.daemon:
            self._running[pid] = service
        command_ended = not service.daemon
        while True:
            self._check_running()
            if not command_ended:
                code = self._keeper.exit_code(pid)
                if code not in (None, 0):
                    raise _ended(service, code)
                command_ended = code == 0
                what: str | None = service.name
            else:
                what = service.ready()
            if what is None:
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{service.name} is not ready after {service.timeout_s:.0f} s: "
                    f"still waiting for {what}",
                    service.log,
                )
            self._progress.waiting(what)
            self._keeper.wait(_POLL_S)

    def watch(self) -> None:
        """Waits for a service to end; costs nothing meanwhile.

        Raises:
            ServiceError: one has ended.
            Stopped: it is time to end.
        """
        while True:
            self._check_running()
            self._keeper.wait(None)

    def _check_running(self) -> None:
        for pid, service in self._running.items():
            code = self._keeper.exit_code(pid)
            if code is not None:
                raise _ended(service, code)


def _spawn(service: Service) -> int:
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(service.log), write, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        return os.posix_spawnp(
            service.command[0], list(service.command), dict(service.env), file_actions=actions
        )
    except OSError as error:
        raise ServiceError(f"cannot start {service.name}: {error}") from error


def _ended(service: Service, code: int | None) -> ServiceError:
    lines = tail(service.log, 1)
    last = f": {lines[0]}" if lines else ""
    return ServiceError(f"{service.name} ended with code {code}{last}", service.log)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log that are not empty; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
