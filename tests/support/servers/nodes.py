"""Two nodes on one machine: network namespaces with an address each and a cable between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes.lifeline import start_tied

ROOT = Path(__file__).resolve().parents[3]

# Sends one request from within a namespace; prints status and text.
_ASK = """
import json, sys, urllib.request, urllib.error
url, body, headers = json.load(sys.stdin)
data = None if body is None else json.dumps(body).encode()
request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
try:
    with urllib.request.urlopen(request, timeout=240) as answer:
        said = answer.status, answer.read().decode()
except urllib.error.HTTPError as error:
    said = error.code, error.read().decode()
except OSError as error:
    said = 0, str(error)
print(json.dumps(said))
"""

_LEAVE = """
import json, sys, urllib.request
url, body, headers, events = json.load(sys.stdin)
headers = {"Content-Type": "application/json", **headers}
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=60) as answer:
    while events:
        events -= answer.readline().startswith(b"data: ")
"""


class NoNamespaces(Exception):
    """This machine does not let us make network namespaces; says why."""


class Node:
    """One namespace. Made by :func:`two_nodes`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts a program in the namespace; it ends with the node."""
        with log.open("wb") as output:
            process = start_tied(
                ["ip", "netns", "exec", self.name, *command],
                output,
                {"PYTHONPATH": str(ROOT), **environment},
                log.parent,
            )
        self._running.append(process)
        return process

    def ask(
        self, url: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Status and text of a request from this node; a POST if there is a body."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, sys.executable, "-I", "-c", _ASK],
            input=json.dumps([url, body, dict(headers or {})]).encode(),
            capture_output=True,
            check=True,
        )
        status, text = json.loads(done.stdout)
        return int(status), str(text)

    def leave(self, url: str, body: Any, headers: Mapping[str, str], after_events: int) -> None:
        """POSTs from this node and goes away after so many lines with events."""
        subprocess.run(
            ["ip", "netns", "exec", self.name, sys.executable, "-I", "-c", _LEAVE],
            input=json.dumps([url, body, dict(headers), after_events]).encode(),
            check=True,
            timeout=60,
        )

    def wait_for(
        self, url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float
    ) -> None:
        """Waits until ``url`` says 200."""
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline:
            if self.ask(url)[0] == 200:
                return
            time.sleep(0.5)
        raise RuntimeError(f"{url} did not get ready:\n{log.read_text()[-6000:]}")

    def stop(self) -> None:
        """Ends what was started here, children too."""
        for process in self._running:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait(10)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other and nobody else; gone afterwards.

    Raises:
        NoNamespaces: they cannot be made here.
    """
    if shutil.which("ip") is None:
        raise NoNamespaces("there is no program `ip` (package iproute2)")
    _clear_away()
    names = [f"baton-{os.getpid()}-{side}" for side in "ab"]
    links = [f"bt{os.getpid()}{side}" for side in "ab"]
    nodes = [Node(name, f"10.213.77.{number}") for number, name in enumerate(names, 1)]
    with ExitStack() as stack:
        for node in nodes:
            _ip("netns", "add", node.name)
            stack.callback(_ip, "netns", "del", node.name)  # and its end of the cable with it
            stack.callback(node.stop)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for node, link in zip(nodes, links, strict=True):
            _ip("link", "set", link, "netns", node.name)
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", link)
            _ip("-n", node.name, "link", "set", link, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes[0], nodes[1]


def _clear_away() -> None:
    """Removes what runs left that were killed."""
    for name in Path("/run/netns").glob("baton-*-[ab]"):
        if not Path(f"/proc/{name.name.split('-')[1]}").exists():
            _ip("netns", "del", name.name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoNamespaces(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
