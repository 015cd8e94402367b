"""What a test starts ends with it, even if it is killed and cleans up nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]

# Both stand in for a test: they start something, say so, and never end it.
STARTS_A_FAMILY = """
import sys, threading, time
from tests.support.processes.lifeline import start_tied
family = "import os, time; os.fork(); os.fork(); print('up', flush=True); time.sleep(300)"
log = open(sys.argv[1], "wb")
thread = threading.Thread(target=start_tied, args=([sys.executable, "-c", family], log))
thread.start()
thread.join()
while open(sys.argv[1]).read().count("up") < 4:
    time.sleep(0.02)
print("ready", flush=True)
time.sleep(300)
"""
STARTS_A_SERVER = """
import sys, time
from pathlib import Path
from tests.support.servers.vllm_server import VllmServer
options = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"]
server = VllmServer(Path(sys.argv[2]), options, Path(sys.argv[1]))
server.start()
server.wait()
print("ready", flush=True)
time.sleep(300)
"""


@contextmanager
def running(script: str, *arguments: Path) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """A script that has started something, and all that descends from it, parents first."""
    script_process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    started: list[psutil.Process] = []
    with script_process:
        try:
            assert script_process.stdout is not None
            assert script_process.stdout.readline() == "ready\n"
            started = psutil.Process(script_process.pid).children(recursive=True)
            yield psutil.Process(script_process.pid), started
        finally:
            script_process.kill()
            for process in started:
                if process.is_running():
                    process.kill()


def left_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that live on; returns at once when there are none."""
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def lives(process: psutil.Process) -> bool:
    try:
        # Whoever adopts orphans here may not reap them: a zombie has ended.
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_test_that_is_killed_takes_along_what_it_started(tmp_path: Path) -> None:
    with running(STARTS_A_FAMILY, tmp_path / "log") as (test, started):
        assert len(started) == 5  # four of the family and the guard
        assert all(map(lives, started))

        test.kill()

        assert left_after(started, 5.0) == []


def test_a_program_that_ends_takes_its_children_along(tmp_path: Path) -> None:
    with running(STARTS_A_FAMILY, tmp_path / "log") as (test, started):
        started[0].kill()

        assert left_after(started, 5.0) == []
        assert lives(test)


def test_a_stock_server_leaves_no_engine_behind(tiny_model: Path, tmp_path: Path) -> None:
    with running(STARTS_A_SERVER, tmp_path / "log", tiny_model) as (test, started):
        assert any("EngineCore" in " ".join(one.cmdline()) for one in started)

        test.kill()

        assert left_after(started, 10.0) == []
