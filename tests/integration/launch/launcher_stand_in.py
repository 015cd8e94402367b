"""A launcher over stand-in services; run by test_launcher.py: ``... FOLDER SCENARIO``."""

from __future__ import annotations

import sys
from pathlib import Path

from serve_app.launch.parent_death import Keeper, run_guarded
from serve_app.launch.services import Progress, Service, ServiceError, ServiceRunner

# Puts itself into a session of its own under a new parent, ignores SIGTERM, starts a child.
DAEMON = """
import os, signal, sys, time
if os.fork():
    sys.exit(0)
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
open(sys.argv[1] + "/daemon-%d" % os.getpid(), "w").close()
time.sleep(300)
"""
FOREGROUND = "import sys, time; open(sys.argv[1] + '/up', 'w').close(); time.sleep(300)"
FAILING = "import sys; print('first'); print('no such device'); sys.exit(7)"


def services(folder: Path, scenario: str) -> list[Service]:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code, str(folder)]

    def up() -> str | None:
        return None if (folder / "up").exists() else "the file up"

    def daemons() -> str | None:
        return None if len(list(folder.glob("daemon-*"))) == 2 else "two daemons"

    log = folder / "service.log"
    daemon = Service("daemon", python(DAEMON), log, daemons, 20, daemon=True)
    foreground = Service("foreground", python(FOREGROUND), log, up, 20)
    never = Service("never", python(FOREGROUND), log, lambda: "Godot", 0.5)
    failing = Service("failing", python(FAILING), log, up, 20)
    missing = Service("missing", ["/no/such/program"], log, up, 20)
    chosen = {
        "ok": [daemon, foreground],
        "never": [daemon, never],
        "failing": [daemon, failing],
        "missing": [daemon, missing],
    }
    return chosen[scenario]


def main() -> int:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]

    def work(keeper: Keeper) -> int:
        runner = ServiceRunner(keeper, Progress())
        try:
            for service in services(folder, scenario):
                runner.start(service)
            print("ready", flush=True)
            runner.watch()
        except ServiceError as error:
            print(f"error: {error}", flush=True)
            return 1
        return 0

    return run_guarded(work)


if __name__ == "__main__":
    sys.exit(main())
