"""Memory that the engine may read from or write to."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from transfer.errors import Phase, RegistrationError
from transfer.spans import coverage, empty_spans, lies_within
from transfer.types import DmaBuf, SpanArray

_ADDRESS_LIMIT = 1 << 63


class MemoryRegion:
    """A registered range of memory; ``close()`` unregisters it.

    The memory must stay mapped until the region is closed, and the region open until no read
    into it and no offer of it goes on any more: the engine cannot take back a system call that
    is under way.
    """

    def __init__(
        self, table: MemoryTable, address: int, length: int, dmabuf: DmaBuf | None
    ) -> None:
        self._table = table
        self.address = address
        self.length = length
        self.dmabuf = dmabuf

    def __repr__(self) -> str:
        state = "open" if self in self._table else "closed"
        kind = "host" if self.dmabuf is None else "device"
        return f"<MemoryRegion {kind} {self.address:#x}+{self.length} {state}>"

    def close(self) -> None:
        """Unregister. Idempotent; any thread."""
        self._table.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class MemoryWatcher(Protocol):
    """Is told of memory that comes and goes, on the thread that registers it."""

    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None: ...

    def remove_memory(self, address: int, length: int) -> None: ...


class MemoryTable:
    """All registered regions of one engine. Thread-safe."""

    def __init__(self, watcher: MemoryWatcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()
        self._regions: list[MemoryRegion] = []
        self._cover: SpanArray = empty_spans()
        self._devices: SpanArray = empty_spans()

    def __contains__(self, region: MemoryRegion) -> bool:
        with self._lock:
            return region in self._regions

    def register(self, address: int, length: int, dmabuf: DmaBuf | None = None) -> MemoryRegion:
        """Add ``length`` bytes at ``address``.

        Args:
            dmabuf: for memory of a device.

        Raises:
            RegistrationError: that is no range of memory.
        """
        check_range(address, length)
        region = MemoryRegion(self, address, length, dmabuf)
        self._watcher.add_memory(address, length, dmabuf)
        with self._lock:
            self._regions.append(region)
            self._recompute()
        return region

    def discard(self, region: MemoryRegion) -> None:
        """Remove ``region`` if it is there."""
        with self._lock:
            known = region in self._regions
            if known:
                self._regions.remove(region)
                self._recompute()
        if known:
            self._watcher.remove_memory(region.address, region.length)

    def check(self, spans: SpanArray, *, what: str, phase: Phase) -> None:
        """See that all spans lie in registered memory.

        Raises:
            RegistrationError: one does not.
        """
        # The array is replaced, never changed: it can be read without the lock.
        if not lies_within(spans, self._cover):
            raise RegistrationError(f"{what} are not all in registered memory", phase=phase)

    def touches_devices(self, spans: SpanArray) -> bool:
        """Whether a byte of ``spans``, which passed :meth:`check`, is memory of a device."""
        devices = self._devices
        if not devices.shape[0] or not spans.shape[0]:
            return False
        before = np.searchsorted(devices[:, 0], spans[:, 0] + spans[:, 1], side="left")
        after = np.searchsorted(devices[:, 0] + devices[:, 1], spans[:, 0], side="right")
        return bool((before > after).any())

    def _recompute(self) -> None:
        self._cover = _cover_of(self._regions)
        self._devices = _cover_of([one for one in self._regions if one.dmabuf is not None])


def check_range(address: int, length: int) -> None:
    """See that this could be memory.

    Raises:
        RegistrationError: that is no range of memory.
    """
    if address <= 0 or length <= 0 or address + length > _ADDRESS_LIMIT:
        raise RegistrationError(
            f"{length} bytes at {address:#x} are not a range of memory", phase=Phase.REGISTER
        )


def _cover_of(regions: list[MemoryRegion]) -> SpanArray:
    rows = [(region.address, region.length) for region in regions]
    return coverage(np.array(rows, dtype=np.uint64).reshape(-1, 2))
