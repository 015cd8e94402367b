"""Leaves no process behind, whichever way this program ends.

``run_guarded`` forks. The parent stays in the foreground: it passes signals on and waits. The
child, the *keeper*, does the work and starts every other process. Both are child subreapers, so a
process whose parent ends, such as a daemon of Ray's, becomes a child of the keeper, and if that
is gone, of the parent: however a process was started, it stays in the tree and can be found.

* The parent is killed, even with SIGKILL: the pipe whose writing end only it holds reads as closed,
  which ends the keeper's every wait, and the keeper ends all its descendants and itself.
* The keeper is killed: its descendants become the parent's, which ends them.

Linux only. Fork before any thread or event loop is started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

_PR_SET_CHILD_SUBREAPER: Final = 36
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

TERM_GRACE_S: Final = 3.0
"""How long processes have between SIGTERM and SIGKILL."""

EXIT_INTERRUPTED: Final = 130
"""What a shell reports for Ctrl-C."""


class Stopped(Exception):
    """The user, the system or the parent's death asks for the end."""


def become_subreaper() -> None:
    """Makes this process the parent of every descendant whose own parent ends.

    Raises:
        OSError: the kernel refused (Linux before 3.4).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descendants() -> set[int]:
    """Process ids of all living descendants of this process; zombies do not count."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        # The name, in brackets, may itself hold blanks and brackets.
        state, parent = stat.rpartition(")")[2].split()[:2]
        children.setdefault(int(parent), []).append(int(entry.name))
        if state == "Z":
            zombies.add(int(entry.name))
    found: set[int] = set()
    queue = [os.getpid()]
    while queue:
        new = [pid for pid in children.get(queue.pop(), ()) if pid not in found]
        found.update(new)
        queue.extend(new)
    return found - zombies


def end_descendants() -> None:
    """Ends every descendant: SIGTERM, and SIGKILL for what is left after ``TERM_GRACE_S``.

    This process must be a subreaper. Looks again until none is left, because processes may start
    others, or replace those that ended, while they are being ended.
    """
    kill_from = time.monotonic() + TERM_GRACE_S
    asked: set[int] = set()
    while True:
        _reap_all()
        living = descendants()
        if not living:
            return
        kill = time.monotonic() >= kill_from
        for pid in living if kill else living - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
        asked |= living
        time.sleep(0.05)


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


class Keeper:
    """The keeper's waiting place. Every wait ends at once when it is time to stop.

    Single-threaded: only the main thread may use it, because signal handlers belong to it.
    """

    def __init__(self, parent_pipe: int) -> None:
        self._parent_pipe = parent_pipe
        self._stop_signal: int | None = None
        self._exit_codes: dict[int, int] = {}
        # Signals make its reading end readable, so that a select() cannot miss one.
        self._signals, self._signals_in = socket.socketpair()
        for end in (self._signals, self._signals_in):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signals_in.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_stop)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        self._stop_signal = number

    def wait(self, timeout_s: float | None) -> None:
        """Sleeps until a child ends, a signal comes, or ``timeout_s`` are over.

        Raises:
            Stopped: it is time to end.
        """
        self._check()
        watched = [self._parent_pipe, self._signals.fileno()]
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if self._signals.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._signals.recv(4096)
        if self._parent_pipe in ready:  # nobody writes to it: it is closed
            raise Stopped("the launcher is gone")
        self._check()

    def _check(self) -> None:
        if self._stop_signal is not None:
            raise Stopped(f"signal {signal.Signals(self._stop_signal).name}")

    def exit_code(self, pid: int) -> int | None:
        """How our child ended (minus the signal if one killed it), or None if it runs.

        Takes note of every other child that ended, daemons that became ours included.
        """
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if ended == 0:
                    break
                self._exit_codes[ended] = os.waitstatus_to_exitcode(status)
        return self._exit_codes.get(pid)

    def close(self) -> None:
        """Gives up the signals; stop signals are ignored from here on."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._signals.close()
        self._signals_in.close()


def run_guarded(work: Callable[[Keeper], int]) -> int:
    """Runs ``work`` in a keeper and returns its exit code; afterwards no descendant is left.

    Args:
        work: called in the keeper. It may start processes in any way, must wait only through the
            keeper it is given, and lets :class:`Stopped` through.
    """
    become_subreaper()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    keeper_pid = os.fork()
    if keeper_pid == 0:
        os.close(writing)
        _keep(work, reading)
    os.close(reading)
    try:
        with _passing_signals_to(keeper_pid):
            _, status = os.waitpid(keeper_pid, 0)
    finally:
        end_descendants()
        os.close(writing)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _keep(work: Callable[[Keeper], int], parent_pipe: int) -> NoReturn:
    """The whole life of the keeper. Never returns into the code that forked."""
    code = 1
    try:
        os.setsid()  # Ctrl-C goes to the parent alone, and so reaches us once
        become_subreaper()
        keeper = Keeper(parent_pipe)
        try:
            code = work(keeper)
        except Stopped:
            code = EXIT_INTERRUPTED
        finally:
            keeper.close()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Exception:  # noqa: BLE001  # a bug: shown here, for nobody above us can
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            end_descendants()
            with contextlib.suppress(OSError):  # the terminal may be gone
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)


@contextlib.contextmanager
def _passing_signals_to(pid: int) -> Iterator[None]:
    def pass_on(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
