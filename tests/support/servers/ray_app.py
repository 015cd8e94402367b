"""A Serve application that is not ours, on a Ray of its own: ``... CONFIG FOLDER RAY_FOLDER``.

Prints ``ready PORT``, the port of Ray's metrics, once Serve runs it; SIGTERM ends everything.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.launch.parent_death import Keeper, run_guarded
from serve_app.launch.serve_driver import read_status
from serve_app.launch.services import Progress, Service, ServiceError, ServiceRunner
from serve_app.launch.surroundings import free_ports
from tests.support.processes.lifeline import start_tied
from tests.support.servers.vllm_server import CPU_ENV, free_port

ROOT = Path(__file__).resolve().parents[3]
HOST = "127.0.0.2"
START_TIMEOUT_S = 420.0


@contextmanager
def ray_app(application: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Runs ``application``, an entry of a Serve config's list; gives its URL and Ray's metrics'."""
    port = free_port()
    config = folder / "serve.yaml"
    config.write_text(
        json.dumps(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": "127.0.0.1", "port": port},
                "applications": [application],
            }
        )
    )
    log = folder / "ray-app.log"
    ray_folder = tempfile.mkdtemp(prefix="baton-", dir="/tmp")  # short, for names of sockets
    with log.open("wb") as output:
        process = start_tied(
            [
                sys.executable,
                "-m",
                "tests.support.servers.ray_app",
                str(config),
                str(folder),
                ray_folder,
            ],
            output,
            {**CPU_ENV, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"},
            ROOT,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready " not in (said := log.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                serve_log = folder / "serve.log"
                more = serve_log.read_text()[-8000:] if serve_log.exists() else ""
                raise RuntimeError(f"the application did not get ready:\n{said}\n{more}")
            time.sleep(0.5)
        metrics = said.rpartition("ready ")[2].split()[0]
        yield f"http://127.0.0.1:{port}", f"http://{HOST}:{metrics}/metrics"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _main(config: Path, folder: Path, ray_folder: str) -> int:
    gcs, client, dashboard, agent, metrics = free_ports(5)
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--head"]
    ray += [f"--node-ip-address={HOST}", f"--port={gcs}", f"--ray-client-server-port={client}"]
    ray += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ray += [f"--metrics-export-port={metrics}", "--include-dashboard=false", "--num-cpus=16"]
    ray += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    ray += [f"--object-store-memory={128 << 20}", f"--temp-dir={ray_folder}"]
    status = folder / "status.json"
    serve = [sys.executable, "-m", "serve_app.launch.serve_driver", str(config), str(status)]
    env = {**os.environ, "RAY_ADDRESS": f"{HOST}:{gcs}"}
    without = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}

    def ready() -> str | None:
        state = read_status(status)
        if failures := state.get("failures"):
            raise ServiceError(f"the application cannot run: {failures[0]}", folder / "serve.log")
        return ", ".join(state["missing"]) or None if state else "Serve"

    def work(keeper: Keeper) -> int:
        runner = ServiceRunner(keeper, Progress())
        try:
            runner.start(
                Service("Ray", ray, folder / "ray.log", lambda: None, 120.0, without, daemon=True)
            )
            runner.start(Service("Serve", serve, folder / "serve.log", ready, START_TIMEOUT_S, env))
            print(f"ready {metrics}", flush=True)
            runner.watch()
        except ServiceError as error:
            print(f"error: {error}", flush=True)
            return 1
        return 0

    return run_guarded(work)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
