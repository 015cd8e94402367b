"""NIXL with its UCX backend, used as by vLLM's connector: descriptors prepared beforehand; for each
read a request made, posted and awaited, which also sends a notification to the owner."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config
from numpy.typing import NDArray

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter
from bench.transfer.systems.base import OwnerEnd, ReaderEnd

_TIMEOUT_S = 60.0
# NIXL's own threads spin and need the cores: short reads are quickest when polled without a pause,
# long ones with pauses.
_SPIN_S = 0.0005
_PAUSE_S = 0.0005


def _agent(name: str, pool: Pool) -> Any:
    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(pool.address, pool.size_bytes, 0, "")], "DRAM")
    return agent


def _descriptors(base: int, block_bytes: int, offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    rows = np.zeros((offsets.size, 3), dtype=np.uint64)
    rows[:, 0] = offsets + base
    rows[:, 1] = block_bytes
    return rows


class Owner(OwnerEnd):
    def open(self, pool: Pool, scratch: str) -> dict[str, Any]:
        self._agent = _agent("owner", pool)
        return {"metadata": base64.b64encode(self._agent.get_agent_metadata()).decode()}

    def offer(self, where: Scatter, reads: int) -> dict[str, Any]:
        self._agent.get_new_notifs()
        return {}

    def close(self) -> None:
        del self._agent


class Reader(ReaderEnd):
    def open(self, pool: Pool, scratch: str, owner: dict[str, Any]) -> None:
        self._agent = _agent("reader", pool)
        self._local_base = pool.address
        self._remote_base = int(owner["base"])
        self._owner = self._agent.add_remote_agent(base64.b64decode(owner["metadata"])).decode()
        self._prepared: list[Any] = []

    def load(self, case: Case, where: Scatter) -> None:
        self._release()
        local = _descriptors(self._local_base, where.block_bytes, where.local)
        remote = _descriptors(self._remote_base, where.block_bytes, where.remote)
        self._prepared = [
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM"),
            self._agent.prep_xfer_dlist(self._owner, remote, "DRAM"),
        ]
        self._indices = np.arange(where.local.size, dtype=np.int32)

    def read(self) -> None:
        local, remote = self._prepared
        agent = self._agent
        request = agent.make_prepped_xfer(
            "READ", local, self._indices, remote, self._indices, b"done"
        )
        start = time.monotonic()
        gentle_from, deadline = start + _SPIN_S, start + _TIMEOUT_S
        state = agent.transfer(request)
        while state == "PROC":
            now = time.monotonic()
            if now > gentle_from:
                time.sleep(_PAUSE_S)
            state = agent.check_xfer_state(request)
            if now > deadline:
                raise TimeoutError(f"not done within {_TIMEOUT_S} s")
        agent.release_xfer_handle(request)
        if state != "DONE":
            raise RuntimeError(f"the transfer's state is {state}")

    def close(self) -> None:
        self._release()
        del self._agent

    def _release(self) -> None:
        for handle in self._prepared:
            self._agent.release_dlist_handle(handle)
        self._prepared = []
