"""Addresses of ``shm``: which process of which host, and how to tell that it is still that one.

``shm://<boot id>/<pid namespace>/<pid>/<address of the seal>/<seal>``

The seal is a page of random bytes in the owner's memory. Host, namespace and pid say whether to
try; only a seal that reads as it should says that this pid is, here and now, the process that was
meant: two virtual machines from one snapshot share a boot id, and pids are used again.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transfer.errors import Phase, ProtocolError, TransportUnavailable

SEAL_BYTES = 16

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_FORM = re.compile(
    r"shm://([0-9a-f-]{1,64})/([0-9]{1,20})/([1-9][0-9]{0,9})/([1-9a-f][0-9a-f]{0,15})/([0-9a-f]{32})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Host:
    """Processes with equal hosts can name each other by pid."""

    boot_id: str
    pid_namespace: int

    @classmethod
    def of_this_process(cls) -> Self:
        """Where this process runs.

        Raises:
            TransportUnavailable: the system does not tell.
        """
        try:
            return cls(_BOOT_ID.read_text().strip(), os.stat(_PID_NAMESPACE).st_ino)
        except OSError as error:
            raise TransportUnavailable(
                f"the system does not say on which host it runs: {error}", phase=Phase.CONNECT
            ) from error


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """One parsed address; ``str()`` gives the text back."""

    host: Host
    pid: int
    seal_address: int
    seal: bytes

    def __str__(self) -> str:
        return (
            f"shm://{self.host.boot_id}/{self.host.pid_namespace}/{self.pid}/"
            f"{self.seal_address:x}/{self.seal.hex()}"
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ``ProtocolError`` for anything else, as addresses come from other processes."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ProtocolError(f"{text[:300]!r} is not an address of shm", phase=Phase.CONNECT)
        boot_id, namespace, pid, seal_address, seal = match.groups()
        return cls(
            Host(boot_id, int(namespace)), int(pid), int(seal_address, 16), bytes.fromhex(seal)
        )
