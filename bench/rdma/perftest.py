"""perftest's ``ib_read_bw``: a server and a client for every sample."""

from __future__ import annotations

import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.rdma.profile import PERFTEST
from bench.transfer.cases import MIB, Case
from bench.transfer.contestants import Contestant
from bench.transfer.host import busy_seconds
from bench.transfer.ports import free_port, wait_for_listener
from bench.transfer.processes import ChildFailed, die_with_parent
from bench.transfer.reporting.results import Sample
from transfer.transports.rdma.rails import Rail

_LISTEN_TIMEOUT_S = 60.0
_RUN_TIMEOUT_S = 120.0
_FEWEST = 5
_STARTS = 3


@dataclass(frozen=True)
class Moved:
    """What one run says: bytes, and bytes per second from the first post to the last completion."""

    total_bytes: int
    bytes_per_s: float


def parse(output: str, block_bytes: int) -> Moved:
    """The line of figures: bytes, iterations, peak and average in MiB/s, millions of messages/s.

    Raises:
        ChildFailed: there is none.
    """
    found = re.search(
        rf"^\s*{block_bytes}\s+(\d+)\s+\S+\s+([\d.]+)\s+\S+\s*$", output, re.MULTILINE
    )
    if found is None or float(found[2]) == 0:
        raise ChildFailed(f"{PERFTEST} gave no figures: {output.strip()[-300:]!r}")
    return Moved(int(found[1]) * block_bytes, float(found[2]) * MIB)


@dataclass(frozen=True)
class _Spent:
    """Seconds of processor time of one run."""

    client_s: float
    server_s: float
    others_s: float
    moved_bytes: int


@dataclass
class Perftest(Contestant):
    """``ib_read_bw`` from this machine to itself, over as many bytes as one of our reads.

    Attributes:
        options: which device, port, address and MTU.
    """

    options: Sequence[str]
    name: str = PERFTEST
    streams_matter: bool = True
    _case: Case | None = None
    _start: _Spent = field(default_factory=lambda: _Spent(0.0, 0.0, 0.0, 0))

    @classmethod
    def on(cls, rail: Rail) -> Perftest:
        return cls(
            [
                f"--ib-dev={rail.device.name}",
                f"--ib-port={rail.port.number}",
                f"--gid-index={rail.gid.index}",
                f"--mtu={128 << rail.port.mtu}",
            ]
        )

    @property
    def missing(self) -> str:
        return "" if shutil.which(PERFTEST) else f"not installed: no {PERFTEST}"

    def skips(self, case: Case) -> bool:
        return case.count == 1

    def load(self, case: Case) -> None:
        """Finds out what the processes spend before and after the reads: see :meth:`sample`."""
        self._case = case
        starts = [self._run(case, _FEWEST)[1] for _ in range(_STARTS)]
        self._start = _Spent(
            statistics.median(start.client_s for start in starts),
            statistics.median(start.server_s for start in starts),
            statistics.median(start.others_s for start in starts),
            starts[0].moved_bytes,
        )

    def sample(self, *, all_bytes: bool) -> Sample:
        """Processor time is what a run takes more than one of the fewest reads possible."""
        assert self._case is not None
        iterations = self._case.count // self._case.streams
        began = time.monotonic()
        moved, spent = self._run(self._case, iterations)
        start = self._start
        return Sample(
            read_s=[moved.total_bytes / moved.bytes_per_s],
            bytes_per_read=moved.total_bytes,
            cpu_bytes=moved.total_bytes - start.moved_bytes,
            reader_cpu_s=max(0.0, spent.client_s - start.client_s),
            owner_cpu_s=max(0.0, spent.server_s - start.server_s),
            others_cpu_s=max(0.0, spent.others_s - start.others_s),
            wall_s=time.monotonic() - began,
        )

    def _run(self, case: Case, iterations: int) -> tuple[Moved, _Spent]:
        """Both processes, from their start to their end.

        Args:
            iterations: reads on each queue pair.
        """
        port = free_port()
        command = [
            *(PERFTEST, *self.options, f"--port={port}", f"--qp={case.streams}"),
            *(f"--size={case.block_bytes}", f"--iters={iterations}"),
        ]
        before_s, busy_s = _children_s(), busy_seconds()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        ) as server:
            try:
                wait_for_listener(server, port, _LISTEN_TIMEOUT_S)
                client = subprocess.run(
                    [*command, "127.0.0.1"],
                    capture_output=True,
                    text=True,
                    timeout=_RUN_TIMEOUT_S,
                )
                # Of children that were waited for: so far the client only.
                client_s = _children_s() - before_s
                server.communicate(timeout=_RUN_TIMEOUT_S)
            except ChildFailed as error:
                server.kill()
                raise ChildFailed(f"{error}: {server.communicate()[0][-300:]!r}") from error
            except subprocess.TimeoutExpired as error:
                raise ChildFailed(f"{PERFTEST} took more than {_RUN_TIMEOUT_S:.0f} s") from error
            finally:
                server.kill()
        server_s = _children_s() - before_s - client_s
        others_s = max(0.0, busy_seconds() - busy_s - client_s - server_s)
        if client.returncode:
            why = " ".join((client.stderr or client.stdout).split())
            raise ChildFailed(f"{PERFTEST} ended with {client.returncode}: {why[-300:]}")
        moved = parse(client.stdout, case.block_bytes)
        return moved, _Spent(client_s, server_s, others_s, moved.total_bytes)

    def unload(self) -> None:
        return

    def resume(self) -> None:
        return

    def pause(self) -> None:
        # Between samples it has no process.
        return

    def kill(self) -> None:
        return

    def close(self) -> None:
        return


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
