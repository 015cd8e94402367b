"""The systems as the runner sees them: started, measured turn by turn, ended."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.transfer.cases import MIB, Case
from bench.transfer.host import busy_seconds, cpu_seconds_of
from bench.transfer.ports import free_port, wait_for_listener
from bench.transfer.processes import Child, ChildFailed, die_with_parent
from bench.transfer.reporting.bars import BEFORE
from bench.transfer.reporting.results import Sample

ROOT = Path(__file__).resolve().parents[2]
_MODULES = "bench.transfer.systems"
_START_TIMEOUT_S = 90.0
_CALL_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5.0


class Contestant(ABC):
    """One system.

    Attributes:
        name: short, in results and tables.
        streams_matter: whether it lets one choose the number of streams.
    """

    name: str
    streams_matter: bool

    @property
    @abstractmethod
    def missing(self) -> str:
        """Why it cannot run here at all; empty when it can."""

    @abstractmethod
    def skips(self, case: Case) -> bool:
        """Whether it is not meant to run this case."""

    @abstractmethod
    def load(self, case: Case) -> None:
        """Get ready for a case, connected and warm; raises :class:`ChildFailed`."""

    @abstractmethod
    def sample(self, *, all_bytes: bool) -> Sample:
        """One turn; raises :class:`ChildFailed`.

        Args:
            all_bytes: check every byte afterwards, not just the ends of every block.
        """

    @abstractmethod
    def unload(self) -> None:
        """Give the memory of the case back."""

    @abstractmethod
    def resume(self) -> None:
        """Let it run again. No effect if it does."""

    @abstractmethod
    def pause(self) -> None:
        """Keep it from using a processor while others are measured."""

    @abstractmethod
    def kill(self) -> None:
        """End its processes at once; the next case starts them anew."""

    @abstractmethod
    def close(self) -> None:
        """End its processes."""


@dataclass
class TwoProcesses(Contestant):
    """A system with a module in :mod:`bench.transfer.systems`.

    Attributes:
        python: interpreter of its environment.
        needs: module or folder whose absence means that it is not installed.
        single: without an owner's process.
        counts: cases of fewer or more blocks are left to another configuration of the system.
        packages: folder that its Python modules are imported from.
        connects_anew: whether it runs cases in which every read connects anew.
        pinned: a device holds the pages of the pools. New ones in their place would be none of its
            business, so they stay from case to case.
    """

    name: str
    module: str
    python: Path
    pool_bytes: int
    scratch: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    streams_matter: bool = False
    single: bool = False
    counts: tuple[int, int] = (0, 1 << 62)
    pinned: bool = False
    packages: Path = ROOT
    connects_anew: bool = False
    _children: dict[str, Child] = field(default_factory=dict)
    _case: Case | None = None
    _loaded: bool = False

    @property
    def missing(self) -> str:
        if not self.python.exists():
            return f"not installed: no {self.python}"
        if self.needs:
            command = [str(self.python), "-c", f"import {self.needs}"]
            found = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
            if found.returncode:
                lines = found.stderr.strip().splitlines() or ["?"]
                return f"not installed: {lines[-1]}"
        return ""

    def skips(self, case: Case) -> bool:
        if case.anew and not self.connects_anew:
            return True
        return not self.counts[0] <= case.count <= self.counts[1]

    def load(self, case: Case) -> None:
        self.resume()
        if not self._children:
            self._start()
        self._case = case
        self._load()

    def sample(self, *, all_bytes: bool) -> Sample:
        assert self._case is not None
        case = self._case
        self.resume()
        if not self._loaded:
            self._load()
        reader, owner = self._children["reader"], self._children.get("owner")
        offer: dict[str, Any] = {}
        if owner is not None:
            offer = self._ask("owner", "offer", reads=case.warm_up + case.reads)
        self._ask("reader", "ready", offer=offer)
        before = _Clocks.read(reader, owner)
        spent_ns: list[int] = self._ask("reader", "read")
        used = _Clocks.read(reader, owner).since(before)
        self._ask("reader", "check", all_bytes=all_bytes)
        return Sample(
            read_s=[spent * 1e-9 for spent in spent_ns],
            bytes_per_read=case.total_bytes,
            cpu_bytes=case.total_bytes * (case.warm_up + case.reads),
            reader_cpu_s=used.reader_s,
            owner_cpu_s=used.owner_s,
            others_cpu_s=max(0.0, used.busy_s - used.reader_s - used.owner_s),
            wall_s=used.wall_s,
        )

    def unload(self) -> None:
        if not self.pinned:
            for role in self._children:
                self._ask(role, "drop")
        self._loaded = False

    def pause(self) -> None:
        if self._case is not None and self._case.is_large and self._loaded and self._children:
            self.unload()
        for child in self._children.values():
            child.pause()

    def kill(self) -> None:
        for child in self._children.values():
            child.kill()
        self._children.clear()
        self._loaded = False

    def close(self) -> None:
        self.resume()
        # A reader may have to tell its owner.
        for role in ("reader", "owner"):
            if role in self._children:
                self._children[role].end(_CLOSE_TIMEOUT_S)
        self._children.clear()

    def _start(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        common = {"pool_bytes": self.pool_bytes, "scratch": str(self.scratch)}
        # Both import at the same time, which takes longest.
        for role in ["reader"] if self.single else ["owner", "reader"]:
            self._children[role] = Child(
                [
                    str(self.python),
                    "-m",
                    "bench.transfer.worker",
                    role,
                    f"{_MODULES}.{self.module}",
                ],
                environment=self._environment(),
                log=self.scratch / f"{self.name}-{role}.log".replace(" ", "-"),
            )
        facts: dict[str, Any] = {}
        if not self.single:
            facts = self._children["owner"].ask("open", _START_TIMEOUT_S, **common)
        self._children["reader"].ask("open", _START_TIMEOUT_S, owner=facts, **common)

    def _load(self) -> None:
        assert self._case is not None
        case = self._case.as_json()
        for child in self._children.values():
            child.tell("load", case=case)
        for child in self._children.values():
            child.answer("load", _CALL_TIMEOUT_S)
        self._loaded = True

    def _ask(self, role: str, what: str, **arguments: Any) -> Any:
        return self._children[role].ask(what, _CALL_TIMEOUT_S, **arguments)

    def resume(self) -> None:
        for child in self._children.values():
            child.resume()

    def _environment(self) -> dict[str, str]:
        # Nothing from the folder that it is started in: another build's may lie there.
        own = {"PYTHONPATH": str(self.packages), "PYTHONSAFEPATH": "1"}
        return {**os.environ, **own, **self.environment}


@dataclass
class _Clocks:
    reader_s: float
    owner_s: float
    busy_s: float
    wall_s: float

    @classmethod
    def read(cls, reader: Child, owner: Child | None) -> _Clocks:
        owner_s = cpu_seconds_of(owner.pid) if owner is not None else 0.0
        return cls(cpu_seconds_of(reader.pid), owner_s, busy_seconds(), time.monotonic())

    def since(self, before: _Clocks) -> _Clocks:
        return _Clocks(
            self.reader_s - before.reader_s,
            self.owner_s - before.owner_s,
            self.busy_s - before.busy_s,
            self.wall_s - before.wall_s,
        )


@dataclass
class Iperf(Contestant):
    """iperf3, the same number of streams: what its plain TCP moves in 512 MiB, from one buffer to
    another. Block and total sizes do not matter to it.

    Attributes:
        congestion: TCP's congestion control; the kernel's choice if empty.
    """

    scratch: Path
    name: str = "iperf3"
    congestion: str = ""
    streams_matter: bool = True
    _server: subprocess.Popen[bytes] | None = None
    _port: int = 0
    _case: Case | None = None

    BYTES = 512 * MIB

    @property
    def missing(self) -> str:
        return "" if shutil.which("iperf3") else "not installed: no iperf3"

    def skips(self, case: Case) -> bool:
        return not 100 * MIB <= case.total_bytes <= 256 * MIB

    def load(self, case: Case) -> None:
        self._case = case
        if self._server is None:
            self._start()

    def sample(self, *, all_bytes: bool) -> Sample:
        assert self._server is not None
        assert self._case is not None
        command = [
            *("iperf3", "--client", "127.0.0.1", "--port", str(self._port), "--json"),
            *("--bytes", str(self.BYTES), "--parallel", str(self._case.streams)),
            *(("--congestion", self.congestion) if self.congestion else ()),
        ]
        wall, busy = time.monotonic(), busy_seconds()
        server_s = cpu_seconds_of(self._server.pid)
        client_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            ran = subprocess.run(command, capture_output=True, timeout=_CALL_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ChildFailed(f"no end within {_CALL_TIMEOUT_S:.0f} s") from error
        client = resource.getrusage(resource.RUSAGE_CHILDREN)
        client_s = client.ru_utime + client.ru_stime
        client_s -= client_before.ru_utime + client_before.ru_stime
        server_s = cpu_seconds_of(self._server.pid) - server_s
        busy, wall = busy_seconds() - busy, time.monotonic() - wall
        answer = json.loads(ran.stdout or b"{}")
        if ran.returncode or "error" in answer:
            raise ChildFailed(f"iperf3: {answer.get('error', ran.stderr.decode()[:200])}")
        received = answer["end"]["sum_received"]
        return Sample(
            read_s=[received["seconds"]],
            bytes_per_read=received["bytes"],
            cpu_bytes=received["bytes"],
            reader_cpu_s=server_s,
            owner_cpu_s=client_s,
            others_cpu_s=max(0.0, busy - client_s - server_s),
            wall_s=wall,
        )

    def unload(self) -> None:
        return

    def resume(self) -> None:
        return

    def pause(self) -> None:
        # Between clients it sleeps.
        return

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def close(self) -> None:
        self.kill()

    def _start(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        with (self.scratch / "iperf3.log").open("ab") as log:
            self._server = subprocess.Popen(
                ["iperf3", "--server", "--bind", "127.0.0.1", "--port", str(self._port)],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        try:
            wait_for_listener(self._server, self._port, 5.0)
        except ChildFailed:
            self.kill()
            raise


def builds(scratch: Path, pool_bytes: int, before: Path | None = None) -> list[Contestant]:
    """Ours over every transport that needs no device.

    Args:
        before: folder to import another build of ours from, which then runs as well.
    """

    def build(scheme: str, suffix: str, packages: Path) -> TwoProcesses:
        name = f"baton {scheme}{suffix}"
        return TwoProcesses(
            name,
            "baton",
            Path(sys.executable),
            pool_bytes,
            scratch / name.replace(" ", "-"),
            environment={"BENCH_BATON_TRANSPORT": scheme},
            needs=f"transfer.transports.{scheme}",
            streams_matter=True,
            packages=packages,
            connects_anew=True,
        )

    found = {"": ROOT} if before is None else {"": ROOT, BEFORE: before}
    return [
        build(scheme, suffix, packages)
        for scheme in ("tcp", "shm")
        for suffix, packages in found.items()
    ]


def contestants(environments: Path, pool_bytes: int, scratch: Path) -> list[Contestant]:
    """All systems, ours first.

    Args:
        environments: folder with the virtual environments ``mooncake`` and ``nixl``.
    """
    own = Path(sys.executable)
    mooncake = environments / "mooncake" / "bin" / "python"
    nixl = environments / "nixl" / "bin" / "python"

    def system(name: str, module: str, python: Path, **more: Any) -> TwoProcesses:
        folder = scratch / name.replace(" ", "-").replace(",", "")
        return TwoProcesses(name, module, python, pool_bytes, folder, **more)

    loopback = {"UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "WARN"}
    return [
        *builds(scratch, pool_bytes),
        system("mooncake tcp", "mooncake", mooncake, needs="mooncake.engine"),
        system(
            "mooncake tcp, in parts",
            "mooncake",
            mooncake,
            needs="mooncake.engine",
            environment={"BENCH_MOONCAKE_DESCRIPTORS": "1000"},
            # More takes many seconds.
            counts=(4096, 50_000),
        ),
        system("nixl", "nixl", nixl, needs="nixl", environment=loopback),
        system("nixl tcp", "nixl", nixl, needs="nixl", environment={**loopback, "UCX_TLS": "tcp"}),
        Iperf(scratch / "iperf3"),
        Iperf(scratch / "iperf3-reno", "iperf3, reno", "reno"),
        system("gloo", "gloo", own, needs="torch", environment={"GLOO_SOCKET_IFNAME": "lo"}),
        system("memcpy", "memcpy", own, single=True),
    ]
