"""Whether transports can reach the KV cache where it is."""

from __future__ import annotations

import os
from typing import Any

import pytest

from transfer.connector.block_settings import read_transfer
from transfer.connector.memory.kv_ranges import KVRange, ranges_in_place
from transfer.connector.settings import ConnectorSettings
from transfer.errors import ConfigurationError, Phase, TransportUnavailable
from transfer.types import DmaBuf

STORAGES = [(4096, 100), (8192, 200)]


def settings(staging: str = "auto", **transfer: Any) -> ConnectorSettings:
    engine, blocks = read_transfer({"transports": ["rdma"], **transfer})
    return ConnectorSettings(host_staging=staging, transfer=engine, blocks=blocks)


class Exports:
    """Gives descriptors of a pipe, and says no from the ``fails_at``-th on."""

    def __init__(self, fails_at: int = 9) -> None:
        self.fds: list[int] = []
        self._fails_at = fails_at

    def __call__(self, address: int, length: int) -> DmaBuf:
        if len(self.fds) == self._fails_at:
            raise TransportUnavailable("the driver said no", phase=Phase.REGISTER)
        self.fds.append(os.dup(1))
        return DmaBuf(self.fds[-1], offset=address % 4096)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_host_memory_is_reached_by_everything() -> None:
    exports = Exports()
    for staging in ("auto", "never"):
        found = ranges_in_place(STORAGES, "cpu", settings(staging, transports="auto"), exports)
        assert found == [KVRange(4096, 100), KVRange(8192, 200)]
    assert exports.fds == []


def test_cuda_memory_is_reached_by_its_dma_bufs() -> None:
    exports = Exports()
    found = ranges_in_place(STORAGES, "cuda", settings(), exports)
    assert found is not None
    assert [(kv_range.address, kv_range.length) for kv_range in found] == STORAGES
    assert [kv_range.dmabuf for kv_range in found] == [DmaBuf(fd) for fd in exports.fds]
    for kv_range in found:
        kv_range.close()
    assert not any(map(is_open, exports.fds))


@pytest.mark.parametrize(
    ("device", "transfer", "why"),
    [
        ("xpu", {}, "only CUDA memory"),
        ("cuda", {"transports": "auto"}, r"transports: \[rdma\], they are auto"),
        ("cuda", {"transports": ["rdma", "tcp"]}, r"transports: \[rdma\]"),
        ("cuda", {"digests": True}, "digests"),
    ],
)
def test_otherwise_blocks_take_another_way_or_the_engine_does_not_start(
    device: str, transfer: dict[str, Any], why: str
) -> None:
    exports = Exports()
    assert ranges_in_place(STORAGES, device, settings(**transfer), exports) is None
    with pytest.raises(ConfigurationError, match=f"host_staging is never.*{why}"):
        ranges_in_place(STORAGES, device, settings("never", **transfer), exports)
    assert exports.fds == []


def test_what_the_driver_refuses_leaves_nothing_open() -> None:
    exports = Exports(fails_at=1)
    assert ranges_in_place(STORAGES, "cuda", settings(), exports) is None
    with pytest.raises(ConfigurationError, match="the driver said no"):
        ranges_in_place(STORAGES, "cuda", settings("never"), Exports(fails_at=0))
    assert len(exports.fds) == 1
    assert not any(map(is_open, exports.fds))
