"""Memory that the devices know."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from transfer.errors import Phase, RegistrationError
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.rails import Rail
from transfer.transports.rdma.verbs.device import Registration
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.types import DmaBuf

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Region:
    dmabuf: DmaBuf | None
    uses: int = 0
    registrations: list[Registration] = field(default_factory=list)


class RegisteredMemory:
    """What the engine registered, registered with every device as well. Thread-safe.

    A range that is registered twice is known to the devices once. One that a device does not take
    is left out with a warning: reads of it go by another transport. If it is memory of another
    device, of which no other transport reads, that is an error.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rails: list[Rail] = []
        self._regions: dict[tuple[int, int], _Region] = {}
        self._local = KeyMap.of([], 1)
        self._remote = self._local

    def __repr__(self) -> str:
        return f"<RegisteredMemory {len(self._regions)} regions, {len(self._rails)} devices>"

    @property
    def local(self) -> KeyMap:
        """Keys for writing what was read, per device."""
        return self._local

    @property
    def remote(self) -> KeyMap:
        """Keys for peers, per device."""
        return self._remote

    def open(self, rails: list[Rail]) -> None:
        """Use these devices from now on, also for what was added before.

        Raises:
            RegistrationError: one does not take another device's memory.
        """
        with self._lock:
            self._rails = rails
            for (address, length), region in self._regions.items():
                self._register(address, length, region)
            self._refresh()

    def add(self, address: int, length: int, dmabuf: DmaBuf | None = None) -> None:
        """A range was registered with the engine; by its dma-buf, if it is a device's.

        Raises:
            RegistrationError: as for :meth:`open`.
        """
        with self._lock:
            region = self._regions.get((address, length))
            if region is None:
                region = _Region(dmabuf)
                self._register(address, length, region)
                self._regions[address, length] = region
                self._refresh()
            region.uses += 1

    def remove(self, address: int, length: int) -> None:
        """It was unregistered: when this returns no device touches it any more."""
        with self._lock:
            region = self._regions.get((address, length))
            if region is None:
                return
            region.uses -= 1
            if region.uses == 0:
                del self._regions[address, length]
                self._refresh()
                self._deregister(region)

    def close(self) -> None:
        """Forget the devices; before they are closed. Idempotent."""
        with self._lock:
            self._rails = []
            for region in self._regions.values():
                self._deregister(region)
            self._refresh()

    def _register(self, address: int, length: int, region: _Region) -> None:
        for rail in self._rails:
            try:
                made = rail.device.register(address, length, region.dmabuf)
                region.registrations.append(made)
            except VerbsError as error:
                self._deregister(region)
                if region.dmabuf is not None:
                    raise RegistrationError(
                        f"{rail.device.name} does not take memory of other devices, and no other "
                        f"transport can: it has to go through host memory ({error})",
                        phase=Phase.REGISTER,
                    ) from error
                logger.warning(
                    "%s does not take %d bytes at %#x (%s; see `ulimit -l`): reads of them go by "
                    "another transport",
                    rail.device.name,
                    length,
                    address,
                    error,
                )
                return

    def _deregister(self, region: _Region) -> None:
        for registration in region.registrations:
            try:
                registration.close()
            except VerbsError as error:  # nobody could do more, and the others are to go
                logger.warning("memory stays registered with a device: %s", error)
        region.registrations = []

    def _refresh(self) -> None:
        known = [
            (address, length, region.registrations)
            for (address, length), region in self._regions.items()
            if region.registrations
        ]
        # Replaced, never changed: read without the lock.
        self._local = self._keys(known, lambda one: one.local_key)
        self._remote = self._keys(known, lambda one: one.remote_key)

    def _keys(
        self,
        known: list[tuple[int, int, list[Registration]]],
        key_of: Callable[[Registration], int],
    ) -> KeyMap:
        regions = (
            (address, length, made[0].base, tuple(map(key_of, made)))
            for address, length, made in known
        )
        return KeyMap.of(regions, max(1, len(self._rails)))
