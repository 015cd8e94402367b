"""The reader's side, and the transport that makes both sides."""

from __future__ import annotations

import os
import threading
import time

from transfer.errors import Phase, TransportUnavailable
from transfer.settings import TransferSettings
from transfer.spans import coverage, slice_plan, total_bytes
from transfer.transports.base import ControlChannel, DataChannel, Listener, OwnerService, Transport
from transfer.transports.rdma.handshake import SCHEME
from transfer.transports.rdma.keys import KeyMap, cut_at_keys
from transfer.transports.rdma.lane_pool import LanePool
from transfer.transports.rdma.memory import RegisteredMemory
from transfer.transports.rdma.owner import RdmaListener
from transfer.transports.rdma.owner_keys import OwnerKeys
from transfer.transports.rdma.rails import Rail, close_rails, gid_index_wanted, open_rails
from transfer.transports.rdma.session import RdmaReadSession
from transfer.transports.rdma.verbs.error import unavailable
from transfer.transports.rdma.work import BATCH_ROWS, Work
from transfer.types import Credentials, DmaBuf, ReaderProcess, ReadPlan

_MAX_BATCH_BYTES = 4 << 20
_MIN_BATCH_BYTES = 4096


class RdmaTransport(Transport):
    """One-sided reads over InfiniBand or RoCE."""

    scheme = SCHEME
    encrypts = False

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._rails: list[Rail] = []
        self._memory = RegisteredMemory()

    def __repr__(self) -> str:
        return f"<RdmaTransport {', '.join(map(str, self._rails)) or 'closed'}>"

    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None:
        self._memory.add(address, length, dmabuf)

    def remove_memory(self, address: int, length: int) -> None:
        self._memory.remove(address, length)

    def listen(self, service: OwnerService) -> Listener:
        index = gid_index_wanted(self._settings.rdma_gid_index, os.environ)
        rails = open_rails(self._settings.rdma_device, index)
        with self._lock:
            self._rails = rails
        opened = False
        try:
            self._memory.open(rails)
            opened = True
            return RdmaListener(rails, self._memory, self._close)
        finally:
            if not opened:
                self._close()

    def open_data(self, address: str, reader: ReaderProcess, control: ControlChannel) -> RdmaData:
        with self._lock:
            rails = self._rails
        if not rails:
            raise TransportUnavailable(
                "rdma does not work: no device is open here",
                phase=Phase.CONNECT,
                peer=str(control.info.peer),
            )
        lanes = LanePool(rails, control, max(self._settings.streams_per_peer, len(rails)))
        # Better to learn now that there is no way than in the first read.
        with unavailable(Phase.CONNECT, lanes.peer):
            lanes.give_back(lanes.take(self._settings.connect_timeout_s))
        most_bytes = min(self._settings.slice_bytes, *(r.port.max_message_bytes for r in rails))
        return RdmaData(self._memory, lanes, OwnerKeys(control), most_bytes)

    def _close(self) -> None:
        with self._lock:
            rails, self._rails = self._rails, []
        self._memory.close()
        close_rails(rails)


class RdmaData(DataChannel):
    """Reads from one owner. Thread-safe.

    Args:
        most_bytes: of one read of a device.
    """

    def __init__(
        self, memory: RegisteredMemory, lanes: LanePool, keys: OwnerKeys, most_bytes: int
    ) -> None:
        self._memory = memory
        self._lanes = lanes
        self._keys = keys
        self._most_bytes = min(most_bytes, _MAX_BATCH_BYTES)

    def __repr__(self) -> str:
        return f"<RdmaData {self._lanes!r}>"

    def open_read(
        self, credentials: Credentials, plan: ReadPlan, timeout_s: float
    ) -> RdmaReadSession:
        deadline = time.monotonic() + timeout_s
        own_keys = self._memory.local
        if not own_keys.cover(plan.local):
            raise TransportUnavailable(
                "the devices here did not take the memory that is to be read into",
                phase=Phase.READ,
                peer=self._lanes.peer,
            )
        read = self._keys.admit(credentials, coverage(plan.remote), deadline)
        with unavailable(Phase.CONNECT, self._lanes.peer):
            lanes = self._lanes.take(deadline - time.monotonic())
            session = None
            try:
                work = self._work(plan, own_keys, read.keys, len(lanes))
                session = RdmaReadSession(read, work, lanes, self._lanes, self._keys)
                return session
            finally:
                if session is None:
                    self._lanes.discard(lanes)

    def close(self) -> None:
        self._lanes.close()

    def _work(self, plan: ReadPlan, own_keys: KeyMap, far_keys: KeyMap, lanes: int) -> Work:
        plan = cut_at_keys(plan, own_keys, far_keys)
        even_share = -(-total_bytes(plan.local) // (lanes * 2))
        batch_bytes = min(self._most_bytes, max(_MIN_BATCH_BYTES, even_share))
        return Work(slice_plan(plan, batch_bytes, BATCH_ROWS), own_keys, far_keys)
