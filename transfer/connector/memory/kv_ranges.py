"""What a worker registers with its transfer engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transfer import cuda
from transfer.connector.settings import ConnectorSettings
from transfer.errors import ConfigurationError, Phase, TransportUnavailable
from transfer.types import DmaBuf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KVRange:
    """A range of memory; of a device's if it has a dma-buf, whose descriptor it owns."""

    address: int
    length: int
    dmabuf: DmaBuf | None = None

    def close(self) -> None:
        """After it is unregistered."""
        if self.dmabuf is not None:
            os.close(self.dmabuf.fd)


def ranges_in_place(
    storages: Sequence[tuple[int, int]],
    device_type: str,
    settings: ConnectorSettings,
    export: Callable[[int, int], DmaBuf] = cuda.export,
) -> list[KVRange] | None:
    """The KV cache as transports can reach it where it is, or None if they cannot.

    Args:
        storages: address and length of its allocations.
        device_type: torch's name of where they are.
        export: raises ``TransportUnavailable``.

    Raises:
        ConfigurationError: they cannot, and the settings want nothing else.
    """
    why = _why_not(device_type, settings)
    if not why:
        try:
            return _exported(storages, None if device_type == "cpu" else export)
        except TransportUnavailable as error:
            why = error.message
    if settings.host_staging == "never":
        raise ConfigurationError(
            f"host_staging is never, but KV blocks cannot be read where they are: {why}",
            phase=Phase.REGISTER,
        )
    logger.info("KV blocks cannot be read where they are: %s", why)
    return None


def _why_not(device_type: str, settings: ConnectorSettings) -> str:
    if device_type == "cpu":
        return ""
    if device_type != "cuda":
        return f"only CUDA memory can be, not that of {device_type}"
    if settings.transfer.transports != ("rdma",):
        return f"that takes transports: [rdma], they are {settings.transfer.transports}"
    if settings.blocks.digests:
        return "digests are made of blocks in host memory"
    return ""


def _exported(
    storages: Sequence[tuple[int, int]], export: Callable[[int, int], DmaBuf] | None
) -> list[KVRange]:
    ranges: list[KVRange] = []
    whole = False
    try:
        for address, length in storages:
            dmabuf = None if export is None else export(address, length)
            ranges.append(KVRange(address, length, dmabuf))
        whole = True
        return ranges
    finally:
        if not whole:
            for made in ranges:
                made.close()
