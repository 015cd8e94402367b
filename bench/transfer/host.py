"""The machine: what it is, and what its processors were used for."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

_CPUCLOCK_SCHED = 2
# Fields of the first line of /proc/stat that are idle time.
_IDLE_FIELDS = (3, 4)
# Guests' time is in user time already.
_FIELDS = 8


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process of this machine, all its threads, to the nanosecond.

    Raises:
        OSError: it is gone.
    """
    # The id that clock_getcpuclockid(3) makes.
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def busy_seconds() -> float:
    """Seconds that all processors together were not idle, in steps of 10 ms."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=20)[1:][:_FIELDS]]
    busy = sum(fields) - sum(fields[at] for at in _IDLE_FIELDS)
    return busy / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Machine:
    """What the report says of where it ran."""

    processor: str
    cores: int
    kernel: str
    python: str
    huge_pages: str
    congestion: str

    @classmethod
    def here(cls) -> Machine:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
        return cls(
            processor=names[0] if names else platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            kernel=platform.release(),
            python=platform.python_version(),
            huge_pages=huge.read_text().split("[")[-1].split("]")[0] if huge.exists() else "?",
            congestion=congestion.read_text().strip() if congestion.exists() else "?",
        )


def load() -> tuple[float, float, float]:
    """Load averages over 1, 5 and 15 minutes."""
    return os.getloadavg()
