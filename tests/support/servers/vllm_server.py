"""Stock vLLM API servers, as users of the connector without Ray run them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.processes.lifeline import start_tied

START_TIMEOUT_S = 240.0
LOG_TAIL = 6000

CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "DO_NOT_TRACK": "1",
}


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
    """POSTs JSON; returns the JSON answer, whatever its status."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read()
            return dict(json.loads(text)) if text else {}
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def get(url: str, timeout_s: float = 30.0) -> tuple[int, str]:
    """Status and text of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return int(response.status), response.read().decode()
    except urllib.error.HTTPError as error:
        return int(error.code), error.read().decode()


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that carry ``labels``; 0 if there are none."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(r"([A-Za-z_:]\w*(?::\w+)*)(?:\{(.*)\})? (\S+)$", line)
        if match is None or match[1] != name:
            continue
        found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
        if all(found.get(key) == value for key, value in labels.items()):
            total += float(match[3])
    return total


class VllmServer:
    """One ``vllm.entrypoints.openai.api_server`` process, ended with its children at exit.

    Args:
        model: folder of the model.
        arguments: further command line arguments.
        log: file that gets its output.
        environment: besides this process's own.
    """

    def __init__(
        self,
        model: Path,
        arguments: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._environment = dict(environment or {})
        self._command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", str(model), "--served-model-name", "tiny"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)),
            *("--distributed-executor-backend", "uni"),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def log_tail(self) -> str:
        """The last lines that it wrote, to be shown when a test fails."""
        return self._log.read_text(errors="replace")[-LOG_TAIL:] if self._log.exists() else ""

    def start(self) -> None:
        """Starts the process; :meth:`wait` waits for it to answer."""
        root = Path(__file__).resolve().parents[3]
        with self._log.open("wb") as log:
            environment = {**CPU_ENV, "PYTHONPATH": str(root), **self._environment}
            self._process = start_tied(self._command, log, environment)

    def wait(self) -> None:
        """Waits until ``/health`` answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if get(f"{self.url}/health", 2.0)[0] == 200:
                    return
            except OSError:
                time.sleep(0.25)
        raise RuntimeError(f"vLLM did not start:\n{self.log_tail()}")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server process, leader of a process group of its own."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process

    @property
    def tp_size(self) -> int:
        """How many ranks the engine has."""
        option = "--tensor-parallel-size"
        return int(self._command[self._command.index(option) + 1]) if option in self._command else 1

    def metric(self, name: str, **labels: str) -> float:
        """A metric of this server; see :func:`metric`."""
        return metric(get(f"{self.url}/metrics")[1], name, **labels)

    def complete(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """A greedy completion."""
        return post(
            f"{self.url}/v1/completions",
            {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 16, **body},
        )

    def kill(self) -> None:
        """Ends the process and its children at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(10)

    def __enter__(self) -> Self:
        self.start()
        RUNNING.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        RUNNING.remove(self)
        self.kill()


RUNNING: list[VllmServer] = []
"""Those within their ``with`` block."""
