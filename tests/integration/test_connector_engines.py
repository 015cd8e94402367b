"""The connector between two stock vLLM servers: no Ray, real etcd, real engines, real sockets."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.vllm_server import VllmServer, post

pytestmark = pytest.mark.timeout(300)

BLOCK = 32  # the CPU attention kernel takes multiples of 32
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def _transfer_config(endpoint: str, role: str, **extra: Any) -> str:
    return json.dumps(
        {
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "transfer.connector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "discovery": {"kind": "etcd", "endpoints": [endpoint], "cluster": "stock"},
                "transfer": {"ticket_ttl_s": 8.0},
                **extra,
            },
        }
    )


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def _server(model: Path, etcd: EtcdServer, role: str, folder: Path, **extra: Any) -> VllmServer:
    return VllmServer(
        model,
        [
            *("--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK)),
            *("--kv-transfer-config", _transfer_config(etcd.endpoint, role, **extra)),
        ],
        folder / f"{role}.log",
    )


@pytest.fixture(scope="module")
def pair(
    tiny_model: Path, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    folder = tmp_path_factory.mktemp("stock")
    with (
        _server(tiny_model, etcd, "kv_producer", folder) as prefill,
        _server(tiny_model, etcd, "kv_consumer", folder) as decode,
    ):
        prefill.wait()
        decode.wait()
        yield prefill, decode


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


def _prompt(length: int, salt: int) -> list[int]:
    return random.Random(salt).choices(range(3, 200), k=length)


def _prefill(server: VllmServer, prompt: list[int]) -> dict[str, Any]:
    answer = server.complete(prompt, max_tokens=1, kv_transfer_params=PREFILL)
    return dict(answer["kv_transfer_params"])


def _texts(choices: list[dict[str, Any]]) -> list[str]:
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def _wait_for(condition: Any, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not come true in time")
        time.sleep(0.05)


def _colocated(server: VllmServer, prompt: list[int], **body: Any) -> str:
    """What one engine alone says: without a ticket the decode server computes the prompt itself.

    A cache salt of its own keeps this run's blocks out of the prefix cache of the tested one.
    """
    answer = server.complete(prompt, cache_salt=f"reference-{time.monotonic_ns()}", **body)
    return str(answer["choices"][0]["text"])


@pytest.mark.parametrize(
    "length",
    [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3, 700],
    ids=lambda length: f"{length}-tokens",
)
def test_same_text_as_one_engine(pair: tuple[VllmServer, VllmServer], length: int) -> None:
    prefill, decode = pair
    prompt = _prompt(length, salt=length)
    expected = _colocated(decode, prompt)
    counters = Counters(*pair)
    ticket = _prefill(prefill, prompt)
    assert ticket["num_tokens"] == length
    assert len(ticket["remote_block_ids"]) == -(-length // BLOCK)
    answer = decode.complete(prompt, kv_transfer_params=ticket)
    assert answer["choices"][0]["text"] == expected
    _wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes.get("computed", 0) <= 1
    assert changes.get("recomputed", 0) == 0
    assert changes["released"] == 1
    if length > 1:
        assert changes["tokens"] == length
        assert changes["ok"] == 1
        assert changes["bytes"] > 0
    else:
        assert changes["forfeited"] == 1


def test_blocks_in_the_local_prefix_cache_are_not_fetched(
    pair: tuple[VllmServer, VllmServer],
) -> None:
    prefill, decode = pair
    shared, tail = _prompt(6 * BLOCK, salt=901), _prompt(2 * BLOCK + 5, salt=902)
    decode.complete([*shared, 3])
    prompt = shared + tail
    expected = _colocated(decode, prompt)
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params=_prefill(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    _wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["tokens"] == len(tail)
    assert changes.get("computed", 0) <= 1


def test_full_local_hit_reads_nothing_and_frees_the_owner(
    pair: tuple[VllmServer, VllmServer],
) -> None:
    prefill, decode = pair
    prompt = _prompt(4 * BLOCK + 1, salt=903)
    expected = decode.complete(prompt)["choices"][0]["text"]
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params=_prefill(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    _wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["forfeited"] == 1
    assert changes["released"] == 1
    assert "bytes" not in changes


def test_n_samples_share_one_ticket(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = pair
    prompt = _prompt(3 * BLOCK + 7, salt=904)
    sampling = {"n": 3, "seed": 11, "temperature": 0.8}
    expected = decode.complete(prompt, cache_salt="reference", **sampling)["choices"]
    counters = Counters(*pair)
    offered = prefill.complete(prompt, max_tokens=1, kv_transfer_params={**PREFILL, "readers": 3})
    answer = decode.complete(prompt, kv_transfer_params=offered["kv_transfer_params"], **sampling)
    assert _texts(answer["choices"]) == _texts(expected)
    assert len(set(_texts(expected))) == 3
    _wait_for(lambda: counters.pinned() == 0)
    assert counters.changes()["released"] == 1


@pytest.mark.parametrize(
    ("field", "value", "outcome"),
    [
        ("token", "0" * 32, "refused"),
        ("fence", 1 << 40, "refused"),
        ("incarnation", "0" * 32, "refused"),
        ("handoff_id", "0" * 32, "refused"),
        ("layout_hash", "0" * 64, "refused"),
        ("version", 99, "refused"),
        ("remote_engine_id", "nobody", "failed"),
        ("prompt_hash", "0" * 64, "refused"),
        ("remote_block_ids", [7, 8, 9], "refused"),
    ],
)
def test_a_ticket_that_is_not_right_is_never_used(
    pair: tuple[VllmServer, VllmServer], field: str, value: Any, outcome: str
) -> None:
    prefill, decode = pair
    prompt = _prompt(2 * BLOCK + 9, salt=10_000 + sum(field.encode()))
    expected = _colocated(decode, prompt)
    ticket = _prefill(prefill, prompt)
    if field == "remote_block_ids":
        value = [block + 1 for block in ticket["remote_block_ids"]]
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params={**ticket, field: value})
    assert answer["choices"][0]["text"] == expected
    changes = counters.changes()
    assert changes.get(outcome) == 1, changes
    assert changes["recomputed"] == len(prompt) - 1
    assert "tokens" not in changes


def test_a_ticket_cannot_be_replayed(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = pair
    prompt = _prompt(2 * BLOCK + 4, salt=905)
    ticket = _prefill(prefill, prompt)
    first = decode.complete(prompt, kv_transfer_params=ticket)
    post(f"{decode.url}/reset_prefix_cache", {})
    counters = Counters(*pair)
    again = decode.complete(prompt, kv_transfer_params=ticket)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert counters.changes()["refused"] == 1


def test_an_unread_ticket_expires(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, _ = pair
    counters = Counters(*pair)
    _wait_for(lambda: counters.pinned() == 0, 20.0)
    _prefill(prefill, _prompt(3 * BLOCK, salt=907))
    _wait_for(lambda: counters.pinned() == 3, 5.0)
    _wait_for(lambda: counters.pinned() == 0, 20.0)
    assert counters.changes()["expired"] >= 1


def test_the_owner_dies_after_the_ticket(
    pair: tuple[VllmServer, VllmServer],
    tiny_model: Path,
    etcd: EtcdServer,
    tmp_path: Path,
) -> None:
    _, decode = pair
    with _server(tiny_model, etcd, "kv_producer", tmp_path) as other:
        other.wait()
        prompt = _prompt(4 * BLOCK + 2, salt=908)
        expected = _colocated(decode, prompt)
        ticket = _prefill(other, prompt)
        other.kill()
        counters = Counters(pair[0], decode)
        answer = decode.complete(prompt, kv_transfer_params=ticket)
    assert answer["choices"][0]["text"] == expected
    assert counters.changes()["failed"] == 1


def test_through_mirrors_in_host_memory(tiny_model: Path, etcd: EtcdServer, tmp_path: Path) -> None:
    """What engines with device memory do, here with host memory on both sides."""
    with (
        _server(tiny_model, etcd, "kv_producer", tmp_path, host_staging="always") as prefill,
        _server(tiny_model, etcd, "kv_consumer", tmp_path, host_staging="always") as decode,
    ):
        prefill.wait()
        decode.wait()
        for length in (2, BLOCK, 5 * BLOCK + 3, 700):
            prompt = _prompt(length, salt=20_000 + length)
            expected = _colocated(decode, prompt)
            counters = Counters(prefill, decode)
            answer = decode.complete(prompt, kv_transfer_params=_prefill(prefill, prompt))
            assert answer["choices"][0]["text"] == expected
            changes = counters.changes()
            assert changes["tokens"] == length
            assert changes.get("computed", 0) <= 1
