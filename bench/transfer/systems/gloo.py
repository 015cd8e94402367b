"""torch.distributed's send and recv over gloo: the reader asks, the owner sends one run of memory.

It has no scattered form; gathering and scattering is left out, in its favour.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter
from bench.transfer.systems.base import OwnerEnd, ReaderEnd

_TIMEOUT = timedelta(hours=2)


def _join(rank: int, scratch: str) -> None:
    store = Path(scratch) / "gloo-store"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=_TIMEOUT
    )


class Owner(OwnerEnd):
    scattered = False

    def open(self, pool: Pool, scratch: str) -> dict[str, Any]:
        self._memory = torch.from_numpy(pool.bytes)
        threading.Thread(target=self._serve, args=(scratch,), daemon=True).start()
        return {}

    def _serve(self, scratch: str) -> None:
        _join(0, scratch)
        wanted = torch.zeros(1, dtype=torch.int64)
        while True:
            dist.recv(wanted, src=1)
            if not (count := int(wanted.item())):
                return
            dist.send(self._memory[:count], dst=1)

    def close(self) -> None:
        # The reader has told the serving thread to end.
        return


class Reader(ReaderEnd):
    scattered = False

    def open(self, pool: Pool, scratch: str, owner: dict[str, Any]) -> None:
        _join(1, scratch)
        self._memory = torch.from_numpy(pool.bytes)

    def load(self, case: Case, where: Scatter) -> None:
        self._wanted = torch.tensor([case.total_bytes], dtype=torch.int64)
        self._target = self._memory[: case.total_bytes]

    def read(self) -> None:
        dist.send(self._wanted, dst=0)
        dist.recv(self._target, src=0)

    def close(self) -> None:
        dist.send(torch.zeros(1, dtype=torch.int64), dst=0)
