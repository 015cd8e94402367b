"""The processes of a running application, and what they hold."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

FD_SLACK = 16
THREAD_SLACK = 16
MEMORY_SLACK_BYTES = 160 << 20
"""What may come and go: pools that fill up on first use, connections to more peers than before."""

_PROXY = "ray::ProxyActor"


@dataclass(frozen=True, slots=True)
class Usage:
    """Most of each that one process of a role holds."""

    fds: int
    threads: int
    memory_bytes: int

    def above(self, before: Usage) -> list[str]:
        """What is more than before, in words."""
        found = []
        for what, now, then, slack in (
            ("file descriptors", self.fds, before.fds, FD_SLACK),
            ("threads", self.threads, before.threads, THREAD_SLACK),
            ("bytes", self.memory_bytes, before.memory_bytes, MEMORY_SLACK_BYTES),
        ):
            if now > then + slack:
                found.append(f"{now} {what}, {then} before")
        return found


class AppProcesses:
    """Everything that descends from one launcher.

    Args:
        launcher: its pid.
    """

    def __init__(self, launcher: int) -> None:
        self._launcher = psutil.Process(launcher)

    def proxy(self) -> psutil.Process:
        """Serve's HTTP proxy.

        Raises:
            LookupError: it is not there now.
        """
        for one in self._all():
            if _PROXY in _name(one):
                return one
        raise LookupError("there is no proxy")

    def replicas(self, side: str) -> list[psutil.Process]:
        """Replica processes of ``Prefill``, ``Decode`` or ``Ingress``."""
        return [one for one in self._all() if f"ServeReplica:baton:{side}" in _name(one)]

    def engines(self) -> list[psutil.Process]:
        """Engine processes, whoever their parent is."""
        return [one for one in self._all() if "EngineCore" in _name(one)]

    def orphans(self) -> list[str]:
        """Engines whose replica is gone."""
        found = []
        for engine in self.engines():
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = engine.parent()
                if parent is None or "ServeReplica" not in _name(parent):
                    found.append(f"engine process {engine.pid}")
        return found

    def usage(self) -> dict[str, Usage]:
        """By role: what the process with the most of it holds."""
        most: dict[str, Usage] = {}
        for process in self._all():
            role = _role(process)
            if role is None:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                so_far = most.get(role, Usage(0, 0, 0))
                most[role] = Usage(
                    max(so_far.fds, process.num_fds()),
                    max(so_far.threads, process.num_threads()),
                    max(so_far.memory_bytes, process.memory_info().rss),
                )
        return most

    def _all(self) -> list[psutil.Process]:
        return list(self._launcher.children(recursive=True))


def _role(process: psutil.Process) -> str | None:
    name = _name(process)
    if _PROXY in name:
        return "proxy"
    for side in ("Prefill", "Decode", "Ingress"):
        if f"ServeReplica:baton:{side}" in name:
            return f"{side} replica"
    if "EngineCore" in name:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            return f"engine of {_role(parent)}" if parent is not None else None
    return None


def _name(process: psutil.Process) -> str:
    """How the process calls itself; empty when it is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
