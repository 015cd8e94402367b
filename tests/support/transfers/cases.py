"""The transports that the conformance suite runs over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.support.network.stalling_proxy import StallingProxy
from tests.support.transfers.stalling_lanes import StallingLanes
from tests.support.transfers.stalling_memory import StallingMemory
from transfer.settings import TransferSettings
from transfer.transports.process_memory import read_process_memory
from transfer.transports.rdma.transport import RdmaTransport
from transfer.transports.rdma.verbs.device import device_names
from transfer.transports.shm.transport import ShmData
from transfer.transports.tcp.transport import TcpData

_WAYS_FOR_BYTES: dict[str, tuple[type, str]] = {
    "tcp": (TcpData, "open_read"),  # connects data streams
    "tcp+tls": (TcpData, "open_read"),
    "shm": (ShmData, "open_read"),  # asks whether the owner admits the read
    "rdma": (RdmaTransport, "open_data"),  # exchanges queue pairs
}
_STALLS: dict[str, type[StallingProxy]] = {"shm": StallingMemory, "rdma": StallingLanes}


@dataclass(frozen=True)
class TransferCase:
    """One transport and what it needs.

    Attributes:
        forced: settings that make engines use it and no other.
    """

    name: str
    forced: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, **tuning: Any) -> TransferSettings:
        """Settings of an engine that uses this transport only."""
        return TransferSettings(**{**self.forced, **tuning})

    @property
    def one_sided(self) -> bool:
        """Whether readers copy without the owner's help."""
        return self.name in ("shm", "rdma")

    @property
    def way_for_bytes(self) -> tuple[type, str]:
        """The class and method with what is left to do on the first read from an owner, once hands
        have been shaken."""
        return _WAYS_FOR_BYTES[self.name]

    def stalled(self, owner_address: str, limit_bytes: int) -> StallingProxy:
        """Makes this process's reads stop once ``limit_bytes`` have come, until it resumes.

        Args:
            owner_address: where the owner takes control messages; readers must use the stall's.
        """
        return _STALLS.get(self.name, StallingProxy)(owner_address, limit_bytes)


def rdma_case() -> TransferCase:
    """RDMA over the devices that ``RDMA_DEVICE`` names, or the best one."""
    device = os.environ.get("RDMA_DEVICE", "")
    return TransferCase("rdma", {"transports": ["rdma"], "rdma_device": device})


def need_rdma_devices(count: int) -> None:
    """Skips the test where there are fewer devices, or fails it where they were to be there."""
    found = device_names()
    machine, device = os.environ.get("RDMA_VM", ""), os.environ.get("RDMA_DEVICE", "")
    promised = {"one": 1, "two": 2}.get(machine, 1 if device else 0)
    if len(found) < promised:
        pytest.fail(
            f"RDMA_VM is {machine!r} and RDMA_DEVICE {device!r}, but the RDMA devices here are "
            f"{found}"
        )
    if len(found) < count:
        pytest.skip(
            f"needs {count} RDMA devices, here are {len(found)}: make test-rdma runs it, in a "
            "virtual machine that has them"
        )


def why_no_process_memory() -> str:
    """Why this machine cannot run the tests over shm; empty when it can."""
    found = np.zeros(8, dtype=np.uint8)
    spans = np.array([[found.ctypes.data, 8]], dtype=np.uint64)
    try:
        read_process_memory(os.getpid(), spans, spans)
    except OSError as error:
        return f"process_vm_readv: {error}"
    return ""
