"""Two stock vLLM servers that hand prompts over, and what a test asks of them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from tests.support.servers.vllm_server import VllmServer

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def transfer_config(endpoint: str, role: str, **changes: Any) -> str:
    """The argument of ``--kv-transfer-config``.

    Args:
        endpoint: etcd's.
        changes: keys of ``kv_connector_extra_config``, or of the whole if it has them.
    """
    config: dict[str, Any] = {
        "kv_connector": "BatonConnector",
        "kv_connector_module_path": "transfer.connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
    }
    extra: dict[str, Any] = {
        "discovery": {"kind": "etcd", "endpoints": [endpoint], "cluster": "stock"},
        "transfer": {"ticket_ttl_s": 8.0},
    }
    for key, value in changes.items():
        (config if key in config else extra)[key] = value
    return json.dumps({**config, "kv_connector_extra_config": extra})


class Counters:
    """What one decode request changed in the servers' metrics."""

    NAMES: ClassVar = {
        "tokens": ("decode", "baton:transfer_tokens_total", {}),
        "recomputed": ("decode", "baton:recomputed_tokens_total", {}),
        "bytes": ("decode", "baton:transfer_bytes_total", {}),
        "ok": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "ok"}),
        "forfeited": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "forfeited"}),
        "refused": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "refused"}),
        "failed": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "failed"}),
        "unproven": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "unproven"}),
        "corrupted": ("decode", "baton:handoffs_total", {"side": "reader", "outcome": "corrupted"}),
        "released": ("prefill", "baton:handoffs_total", {"side": "owner", "outcome": "released"}),
        "expired": ("prefill", "baton:handoffs_total", {"side": "owner", "outcome": "expired"}),
        "computed": ("decode", "vllm:prompt_tokens_by_source_total", {"source": "local_compute"}),
    }

    def __init__(self, prefill: VllmServer, decode: VllmServer) -> None:
        self._servers = {"prefill": prefill, "decode": decode}
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        return {
            key: self._servers[side].metric(name, **labels)
            for key, (side, name, labels) in self.NAMES.items()
        }

    def changes(self) -> dict[str, float]:
        now = self._read()
        return {key: now[key] - self._before[key] for key in now if now[key] != self._before[key]}

    def pinned(self) -> float:
        return self._servers["prefill"].metric("baton:pinned_blocks")


def make_prompt(length: int, salt: int) -> list[int]:
    return random.Random(salt).choices(range(3, 200), k=length)


def prefill_ticket(server: VllmServer, prompt: list[int]) -> dict[str, Any]:
    answer = server.complete(prompt, max_tokens=1, kv_transfer_params=PREFILL)
    return dict(answer["kv_transfer_params"])


def colocated(server: VllmServer, prompt: list[int], **body: Any) -> str:
    """What one engine alone says: without a ticket the decode server computes the prompt itself.

    A cache salt of its own keeps this run's blocks out of the prefix cache of the tested one.
    """
    answer = server.complete(prompt, cache_salt=f"reference-{time.monotonic_ns()}", **body)
    return str(answer["choices"][0]["text"])


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not come true in time")
        time.sleep(0.05)
