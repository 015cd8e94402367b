"""One machine of a cluster: Ray, and on the head etcd, as one unit that starts and stops whole.

cluster.yaml calls it, because Ray offers no way to stop the processes of one cluster only and
knows nothing of etcd::

    python -m serve_app.launch.cluster_node start --etcd 10.0.0.10 -- ray start --head ...
    python -m serve_app.launch.cluster_node start -- ray start --address=10.0.0.10:6379 ...
    python -m serve_app.launch.cluster_node stop

A supervisor process stays behind; everything else descends from it and ends with it, however it
ends (:mod:`serve_app.launch.parent_death`). It ends by itself when Ray's raylet does, so
``ray down`` and ``ray stop`` take etcd along. Its process id, and the logs, are in
``$BATON_STATE`` (``~/.baton``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from serve_app.launch.etcd_binary import find_etcd
from serve_app.launch.no_proxy import without_proxy
from serve_app.launch.parent_death import TERM_GRACE_S, Keeper, descendants, run_guarded
from serve_app.launch.services import Progress, Service, ServiceError, ServiceRunner, tail

_ETCD_PORT: Final = 2379
_ETCD_PEER_PORT: Final = 2380
_ETCD_TIMEOUT_S: Final = 30.0
_RAY_TIMEOUT_S: Final = 120.0
_START_TIMEOUT_S: Final = 180.0
_STOP_TIMEOUT_S: Final = 20.0
_KILL_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.1
_LOOK_EVERY_S: Final = 30.0


class NodeError(Exception):
    """The machine could not be started or stopped; one line for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands above; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        state = _state_folder()
        if options.action == "stop":
            stop(state)
        elif options.action == "start":
            start(state, _run_arguments(options))
        else:
            return run(state, options.command, _etcd_command(options, state))
    except (NodeError, FileNotFoundError) as error:
        _say(str(error))
        return 1
    return 0


def start(state: Path, run_arguments: Sequence[str]) -> None:
    """Ends what an earlier start left, starts the supervisor, and returns when all is up.

    Raises:
        NodeError: it did not come up; carries the end of its log.
    """
    stop(state)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = state / "node.log"
    command = [sys.executable, "-m", "serve_app.launch.cluster_node", "run", *run_arguments]
    log.unlink(missing_ok=True)
    log.touch(mode=0o600)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # it survives the SSH session that runs this
        )
    _record(state).touch(mode=0o600)
    _record(state).write_text(json.dumps({"pid": process.pid, "born": _born(process.pid)}))
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _ready(state).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(state)
            lines = "\n".join(tail(log, 20))
            raise NodeError(f"this node did not start; the end of {log}:\n{lines}")
        time.sleep(_POLL_S)


def stop(state: Path) -> None:
    """Ends the node that was started with this state folder, if any, and nothing else.

    Raises:
        NodeError: the supervisor would not end.
    """
    pid = _running(state)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _gone(state, _STOP_TIMEOUT_S):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the keeper notices and ends the rest
            if not _gone(state, _KILL_TIMEOUT_S):
                raise NodeError(f"process {pid} does not end")
            time.sleep(TERM_GRACE_S + 1)
    _record(state).unlink(missing_ok=True)
    _ready(state).unlink(missing_ok=True)


def run(state: Path, ray_command: Sequence[str], etcd_command: Sequence[str] | None) -> int:
    """The supervisor: stays in the foreground until stopped, or until the raylet or etcd ends.

    Args:
        ray_command: ``ray start`` without ``--block``.
        etcd_command: etcd's, if this node runs one.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    _ready(state).unlink(missing_ok=True)

    def work(keeper: Keeper) -> int:
        runner = ServiceRunner(keeper, Progress())
        try:
            if etcd_command is not None:
                shutil.rmtree(_etcd_data(state), ignore_errors=True)
                runner.start(_etcd_service(state, etcd_command))
            runner.start(_ray_service(state, ray_command))
            needed = {"raylet"} if etcd_command is None else {"raylet", "etcd"}
            _ready(state).touch()
            while not (missing := needed - _names_of_descendants()):
                keeper.wait(_LOOK_EVERY_S)  # a child that ends wakes it up
                keeper.exit_code(0)  # takes note of those, or they would stay as zombies
        except ServiceError as error:
            _say(str(error))
            if error.log is not None:
                _say("\n".join(tail(error.log, 20)))
            return 1
        _say(f"{' and '.join(sorted(missing))} ended, so this node ends")
        return 0

    return run_guarded(work)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _names_of_descendants() -> set[str]:
    names = set()
    for pid in descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


def _ray_service(state: Path, command: Sequence[str]) -> Service:
    # Its processes become the keeper's when the command ends.
    log = state / "ray.log"
    log.unlink(missing_ok=True)
    return Service(
        "ray start",
        command,
        log,
        lambda: None,
        _RAY_TIMEOUT_S,
        without_proxy(os.environ),
        daemon=True,
    )


def _etcd_service(state: Path, command: Sequence[str]) -> Service:
    url = command[command.index("--advertise-client-urls") + 1]
    log = state / "etcd.log"
    log.unlink(missing_ok=True)
    return Service("etcd", command, log, functools.partial(_etcd_waits, url), _ETCD_TIMEOUT_S)


def _etcd_waits(url: str) -> str | None:
    # No proxy: this is another process on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=1) as answer:
            return None if b"true" in answer.read() else "etcd to be healthy"
    except (urllib.error.URLError, OSError):
        return "etcd to answer"


def _etcd_command(options: argparse.Namespace, state: Path) -> list[str] | None:
    """What it holds lives under leases of running workers, so nothing is kept across starts."""
    if options.etcd is None:
        return None
    host = f"[{options.etcd}]" if ":" in options.etcd else options.etcd
    client = f"http://{host}:{options.etcd_port}"
    loopback = f"http://127.0.0.1:{options.etcd_port}"
    peer = f"http://127.0.0.1:{options.etcd_peer_port}"
    return [
        *(str(find_etcd()), "--name", "baton", "--data-dir", str(_etcd_data(state))),
        *("--listen-client-urls", ",".join(dict.fromkeys((client, loopback)))),
        *("--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"baton={peer}", "--unsafe-no-fsync", "--log-level", "warn"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.launch.cluster_node")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("start", "start this node's processes and return when they are up"),
        ("run", "the same in the foreground, for a service manager"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("--etcd", metavar="HOST", help="run etcd too, on this address")
        action.add_argument("--etcd-port", type=int, default=_ETCD_PORT)
        action.add_argument("--etcd-peer-port", type=int, default=_ETCD_PEER_PORT)
        action.add_argument("command", nargs="+", help="-- ray start ... (without --block)")
    actions.add_parser("stop", help="end what start or run started")
    return parser


def _run_arguments(options: argparse.Namespace) -> list[str]:
    etcd = [] if options.etcd is None else ["--etcd", options.etcd]
    etcd += ["--etcd-port", str(options.etcd_port), "--etcd-peer-port", str(options.etcd_peer_port)]
    return [*etcd, "--", *options.command]


def _state_folder() -> Path:
    if chosen := os.environ.get("BATON_STATE"):
        return Path(chosen)
    try:
        return Path.home() / ".baton"
    except RuntimeError as error:  # no HOME, and no such user in the system's list
        raise NodeError(
            "there is no home folder to keep state in: set HOME, or BATON_STATE to a folder"
        ) from error


def _record(state: Path) -> Path:
    return state / "node.json"


def _ready(state: Path) -> Path:
    return state / "ready"


def _etcd_data(state: Path) -> Path:
    return state / "etcd"


def _running(state: Path) -> int | None:
    """The supervisor's process id, or None if it does not run, its number being reused or not."""
    try:
        record = json.loads(_record(state).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise NodeError(f"{_record(state)} is damaged: {error}") from error
    pid = int(record["pid"])
    return pid if record["born"] is not None and _born(pid) == record["born"] else None


def _gone(state: Path, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while _running(state) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it runs no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


if __name__ == "__main__":
    sys.exit(main())
