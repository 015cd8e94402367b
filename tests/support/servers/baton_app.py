"""A whole Baton application as a user starts it: ``baton up``, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from tests.support.processes.lifeline import start_tied
from tests.support.servers.vllm_server import free_port, get

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 280.0


def write_config(
    folder: Path,
    *,
    model: str,
    model_id: str = "test-model",
    engine: dict[str, Any] | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    transfer: dict[str, Any] | None = None,
    discovery: dict[str, Any] | None = None,
) -> Path:
    """A Serve config like the demo's, with small engines in float32."""
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    document["applications"][0]["args"].update(
        model={"id": model_id, "source": model},
        engine={
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": 32,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            **(engine or {}),
        },
        prefill=prefill or {"replicas": 1},
        decode=decode or {"replicas": 1},
        router=router or {},
        transfer=transfer or {},
    )
    if discovery is not None:
        document["applications"][0]["args"]["discovery"] = discovery
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class BatonApp:
    """Starts ``baton up`` on a free port and ends it with SIGTERM.

    Args:
        config: the Serve config file.
        log: gets the launcher's output.
        env: more environment for all processes.
        options: more options for ``baton up``.
    """

    def __init__(
        self,
        config: Path,
        log: Path,
        env: dict[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._env = env or {}
        self._options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._deployed: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = start_tied(
                [
                    *(sys.executable, "-m", "serve_app.cli", "up", str(self._config)),
                    *("--port", str(self.port), *self._options),
                ],
                log,
                {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **self._env},
                ROOT,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if get(f"{self.url}/health", 12.0)[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"baton up did not get ready:\n{self.log.read_text()[-8000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The launcher."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process

    def stop(self) -> None:
        """Ends the application as a service manager would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def deploy(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Gives Serve another configuration: the last one, changed. Returns when it has it."""
        driver = next(
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if "serve_app.launch.serve_driver" in one.cmdline()
        )
        if self._deployed is None:
            self._deployed = dict(yaml.safe_load(Path(driver.cmdline()[-2]).read_text()))
        change(self._deployed)
        path = self._config.with_name("deployed.yaml")
        path.write_text(yaml.safe_dump(self._deployed))
        serve = str(Path(sys.executable).with_name("serve"))
        done = subprocess.run(
            [serve, "run", str(path), "--non-blocking"],
            cwd=ROOT,
            env=driver.environ(),
            capture_output=True,
            timeout=180,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"not deployed:\n{done.stderr.decode()[-4000:]}")

    def status(self) -> dict[str, list[dict[str, Any]]]:
        """Transfer status of all workers, by side."""
        code, text = get(f"{self.url}/baton/status")
        if code != 200:
            raise RuntimeError(f"status {code}: {text}")
        return dict(json.loads(text))

    def totals(self, side: str) -> dict[str, int]:
        """Sums of one side's transfer counts since start."""
        summed: dict[str, int] = {}
        for worker in self.status()[side]:
            for name, count in worker["totals"].items():
                summed[name] = summed.get(name, 0) + count
        return summed

    def pinned_blocks(self) -> int:
        """Blocks that prefill workers hold for readers now."""
        return sum(worker["pinned_blocks"] for worker in self.status()["prefill"])
