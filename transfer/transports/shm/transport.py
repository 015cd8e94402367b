"""Same host: the reader copies straight out of the owner's memory.

The owner takes no part in the copying. It is asked before, over the control connection, whether
the ticket admits the read, and after, with the same read id, whether the blocks stayed pinned; only
that answer makes the bytes good. What an owner can read of a reader by this is nothing; a reader
that the kernel lets in could read all of the owner, ticket or not (see docs/transfer.md).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from transfer.errors import FatalError, PeerUnreachable, Phase, TransferError, TransportUnavailable
from transfer.settings import TransferSettings
from transfer.spans import (
    by_remote_address,
    join_neighbours,
    slice_plan,
    total_bytes,
    without_first,
)
from transfer.transports import process_memory
from transfer.transports.base import (
    ControlChannel,
    DataChannel,
    Listener,
    OwnerService,
    ReadSession,
    Transport,
)
from transfer.transports.interrupt import Interrupt
from transfer.transports.shm.address import SEAL_BYTES, Host, ShmAddress
from transfer.types import Credentials, ReaderProcess, ReadPlan, SpanArray

# A call cannot be stopped: this bounds how long a cancelled read goes on, to a few milliseconds.
_MAX_SLICE_BYTES = 4 << 20
# For every row of the owner's the kernel finds and holds its pages, which takes as long as to copy
# some kilobytes. Where rows are small they are read in the order of the owner's memory: those that
# are neighbours then count as one, and the others are found sooner.
_SMALL_ROW_BYTES = 32 << 10
# Less is not worth a second thread.
_MIN_SLICE_BYTES = 1 << 20

_WHY = {
    errno.EPERM: "the kernel forbids to read the owner's memory (another user or user namespace, "
    "ptrace_scope or seccomp)",
    errno.ENOSYS: "the system does not have process_vm_readv",
    errno.EFAULT: "memory of the owner is not there any more",
}


class ShmTransport(Transport):
    """Reads from processes of this host by ``process_vm_readv``."""

    scheme = "shm"
    # Nothing leaves the host.
    encrypts = True

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings

    def listen(self, service: OwnerService) -> Listener:
        return ShmListener(Host.of_this_process())

    def open_data(self, address: str, reader: ReaderProcess, control: ControlChannel) -> ShmData:
        owner, here = ShmAddress.parse(address), Host.of_this_process()
        if owner.host.boot_id != here.boot_id:
            raise _unavailable("the owner runs on another host", control)
        if owner.host != here:
            raise _unavailable("the owner is in another pid namespace", control)
        channel = ShmData(owner, control, self._settings)
        try:
            channel.check_seal()
        except PeerUnreachable as error:
            # It has just answered, so it lives, in a clone of this machine that shares its boot id.
            raise _unavailable(f"process {owner.pid} is not on this host", control) from error
        return channel


class ShmListener(Listener):
    """Keeps the seal; reading needs nobody to serve."""

    def __init__(self, host: Host) -> None:
        seal = secrets.token_bytes(SEAL_BYTES)
        self._page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page[:SEAL_BYTES] = seal
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._address = str(ShmAddress(host, os.getpid(), at, seal))

    def __repr__(self) -> str:
        return f"<ShmListener {'closed' if self._page.closed else self._address}>"

    @property
    def address(self) -> str:
        return self._address

    def close(self) -> None:
        """Break the seal: no read begins any more."""
        if not self._page.closed:
            self._page[:SEAL_BYTES] = bytes(SEAL_BYTES)
            self._page.close()


class ShmData(DataChannel):
    """Reads from one process."""

    def __init__(
        self, owner: ShmAddress, control: ControlChannel, settings: TransferSettings
    ) -> None:
        self._owner = owner
        self._control = control
        self._settings = settings
        self._seal_span = np.array([[owner.seal_address, SEAL_BYTES]], dtype=np.uint64)

    def __repr__(self) -> str:
        return f"<ShmData {self._control.info.peer} pid {self._owner.pid}>"

    def check_seal(self) -> None:
        """See that the process is the one that was meant.

        Raises:
            TransportUnavailable: it is not, or must not be read.
            PeerUnreachable: it is gone.
        """
        found = np.zeros(SEAL_BYTES, dtype=np.uint8)
        local = np.array([[found.ctypes.data, SEAL_BYTES]], dtype=np.uint64)
        self.copy(local, self._seal_span)
        if not secrets.compare_digest(found.tobytes(), self._owner.seal):
            raise _unavailable(f"process {self._owner.pid} is not the owner", self._control)

    def copy(self, local: SpanArray, remote: SpanArray) -> int:
        """One system call; the bytes it copied. Raises as :meth:`check_seal`."""
        try:
            count = process_memory.read_process_memory(self._owner.pid, local, remote)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise PeerUnreachable(
                    f"process {self._owner.pid} is gone",
                    phase=Phase.READ,
                    peer=str(self._control.info.peer),
                ) from error
            why = _WHY.get(error.errno or 0, f"process_vm_readv failed: {error}")
            raise _unavailable(why, self._control) from error
        if not count:
            raise _unavailable("process_vm_readv copied nothing", self._control)
        return count

    def open_read(
        self, credentials: Credentials, plan: ReadPlan, timeout_s: float
    ) -> ShmReadSession:
        read_id = uuid.uuid4().hex
        ask = partial(self._control.begin_read, credentials, plan.remote, read_id, timeout_s)
        if _has_small_rows(plan):
            plan = _sorted_meanwhile(plan, ask)
        else:
            ask()
        self.check_seal()
        return ShmReadSession(self, read_id, plan, self._settings)

    def close(self) -> None:
        pass  # holds nothing


class ShmReadSession(ReadSession):
    """One read, by a few threads that share its slices."""

    def __init__(
        self, channel: ShmData, read_id: str, plan: ReadPlan, settings: TransferSettings
    ) -> None:
        self.read_id = read_id
        self._channel = channel
        self._total_bytes = total_bytes(plan.local)
        threads = settings.streams_per_peer
        even_share = -(-self._total_bytes // threads)
        most_bytes = min(_MAX_SLICE_BYTES, settings.slice_bytes)
        slice_bytes = min(most_bytes, max(_MIN_SLICE_BYTES, even_share))
        self._slices = deque(slice_plan(plan, slice_bytes, process_memory.IOV_MAX))
        self._small_rows = _has_small_rows(plan)
        self._helpers = min(threads, len(self._slices)) - 1
        self._lock = threading.Lock()
        self._moved = 0
        self._error: TransferError | None = None

    @property
    def bytes_moved(self) -> int:
        return self._moved

    def run(self, interrupt: Interrupt) -> None:
        helpers: list[threading.Thread] = []
        through = False
        try:
            for _ in range(self._helpers):
                helper = threading.Thread(
                    target=self._drive, args=(interrupt,), name="baton-copy", daemon=True
                )
                try:
                    helper.start()
                except RuntimeError:  # the system has no more: the others share its slices
                    break
                helpers.append(helper)
            self._drive(interrupt)
            through = True
        finally:
            if not through:
                self._slices.clear()
            for helper in helpers:
                helper.join()
        interrupt.check()
        if self._error is not None:
            raise self._error
        if self._moved != self._total_bytes:
            raise FatalError(
                f"{self._moved} of {self._total_bytes} bytes were copied", phase=Phase.READ
            )

    def close(self) -> None:
        pass  # holds nothing

    def _drive(self, interrupt: Interrupt) -> None:
        try:
            while (slice_ := self._next_slice()) is not None:
                self._copy(slice_, interrupt)
        except TransferError as error:
            with self._lock:
                if self._error is None:
                    self._error = error

    def _copy(self, slice_: ReadPlan, interrupt: Interrupt) -> None:
        left = total_bytes(slice_.local)
        while left and self._error is None:
            interrupt.check()
            remote = join_neighbours(slice_.remote) if self._small_rows else slice_.remote
            count = self._channel.copy(slice_.local, remote)
            with self._lock:
                self._moved += count
            left -= count
            if left:
                # The row at which it stopped shows in the next call why.
                slice_ = without_first(slice_, count)

    def _next_slice(self) -> ReadPlan | None:
        try:
            return None if self._error is not None else self._slices.popleft()
        except IndexError:
            return None


def _sorted_meanwhile(plan: ReadPlan, ask: Callable[[], object]) -> ReadPlan:
    """``plan`` in order, sorted while the owner looks at what is asked for: that takes about as
    long."""
    with ThreadPoolExecutor(1, "baton-sort") as helper:
        try:
            ordered = helper.submit(by_remote_address, plan)
        except RuntimeError:  # the system has no more threads
            ask()
            return by_remote_address(plan)
        ask()
    return ordered.result()


def _has_small_rows(plan: ReadPlan) -> bool:
    rows = int(plan.local.shape[0])
    return rows > 1 and total_bytes(plan.local) < rows * _SMALL_ROW_BYTES


def _unavailable(why: str, control: ControlChannel) -> TransportUnavailable:
    return TransportUnavailable(
        f"shm does not work: {why}", phase=Phase.CONNECT, peer=str(control.info.peer)
    )
