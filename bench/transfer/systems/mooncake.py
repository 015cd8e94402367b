"""Mooncake's transfer engine over TCP: one synchronous batch call per read, as its own connector
for vLLM makes them, or several of fewer descriptors each."""

from __future__ import annotations

import os
from typing import Any

from mooncake.engine import TransferEngine

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter
from bench.transfer.systems.base import OwnerEnd, ReaderEnd

_HOST = "127.0.0.1"
_MAX_DESCRIPTORS = int(os.environ.get("BENCH_MOONCAKE_DESCRIPTORS", str(1 << 30)))


def _engine(pool: Pool) -> Any:
    engine = TransferEngine()
    if code := engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError(f"initialize returned {code}")
    if code := engine.register_memory(pool.address, pool.size_bytes):
        raise RuntimeError(f"register_memory returned {code}")
    return engine


class Owner(OwnerEnd):
    def open(self, pool: Pool, scratch: str) -> dict[str, Any]:
        self._engine = _engine(pool)
        return {"port": self._engine.get_rpc_port()}

    def close(self) -> None:
        del self._engine


class Reader(ReaderEnd):
    def open(self, pool: Pool, scratch: str, owner: dict[str, Any]) -> None:
        self._engine = _engine(pool)
        self._local_base = pool.address
        self._remote_base = int(owner["base"])
        self._target = f"{_HOST}:{owner['port']}"

    def load(self, case: Case, where: Scatter) -> None:
        local = (where.local + self._local_base).tolist()
        remote = (where.remote + self._remote_base).tolist()
        self._batches = []
        for at in range(0, len(local), _MAX_DESCRIPTORS):
            to, source = local[at : at + _MAX_DESCRIPTORS], remote[at : at + _MAX_DESCRIPTORS]
            self._batches.append((to, source, [where.block_bytes] * len(to)))

    def read(self) -> None:
        for to, source, lengths in self._batches:
            code = self._engine.batch_transfer_sync_read(self._target, to, source, lengths)
            if code:
                raise RuntimeError(
                    f"batch_transfer_sync_read of {len(to)} descriptors returned {code}"
                )

    def close(self) -> None:
        del self._engine
