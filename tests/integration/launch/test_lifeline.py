"""Processes that end with their parent, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]

CHILD = """
import sys, time
from transfer.lifeline import die_with_parent
for _ in range(int(sys.argv[1])):
    die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, threading, time
def start():
    child = subprocess.Popen([sys.executable, "-c", *sys.argv[2:]], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
if sys.argv[1] == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
time.sleep(60)
"""


@contextmanager
def family(
    *, calls: int, started_by: str = "main"
) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A parent and its child, which asked to die with it so many times."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, started_by, CHILD, str(calls)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if parent.stdout is None:
        raise RuntimeError("the pipe is missing")
    child = None
    try:
        child = psutil.Process(int(parent.stdout.readline()))
        yield psutil.Process(parent.pid), child
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if child is not None and child.is_running():
            child.kill()


def ends_within(process: psutil.Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # Whoever adopts orphans here may not reap them: a zombie has ended.
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("calls", [1, 3])
def test_child_ends_when_its_parent_is_killed(calls: int) -> None:
    with family(calls=calls) as (parent, child):
        assert not ends_within(child, 0.3)

        parent.send_signal(signal.SIGKILL)

        assert ends_within(child, 2.0)


def test_child_lives_on_when_only_the_thread_that_started_it_ends() -> None:
    # Engines are started from threads; Linux's own PR_SET_PDEATHSIG would kill them here.
    with family(calls=1, started_by="thread") as (parent, child):
        assert not ends_within(child, 0.5)
        assert parent.is_running()


def test_child_that_did_not_ask_lives_on() -> None:
    # Otherwise the tests above would prove nothing.
    with family(calls=0) as (parent, child):
        parent.send_signal(signal.SIGKILL)

        assert not ends_within(child, 1.0)


def test_watching_costs_no_processor_time() -> None:
    with family(calls=1) as (_, child):
        before = child.cpu_times()
        time.sleep(0.5)
        after = child.cpu_times()

        assert (after.user + after.system) - (before.user + before.system) <= 0.05
