"""Engines whose ranks, block sizes or both differ: real engines, of one and of two processes.

Two KV heads divide among two ranks; one KV head is in both of them. Everybody keeps digests, so
that every prompt below is also checked bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.connector.corrupting_connector import FOLDER
from tests.support.models.tiny_model import make_tiny_model
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.stock_servers import (
    Counters,
    colocated,
    make_prompt,
    prefill_ticket,
    transfer_config,
    wait_for,
)
from tests.support.servers.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(420)

LENGTHS = (2, 33, 97, 700)
BYTES_OF_A_TOKEN = 2 * 2 * 32 * 4  # per KV head: two layers, key and value, head size, float32


@dataclass(frozen=True)
class Engines:
    """Two engines, either of which can prefill and decode; ``faults`` is for the connector."""

    one: VllmServer
    other: VllmServer
    kv_heads: int
    faults: Path

    def direction(self, forth: bool) -> tuple[VllmServer, VllmServer]:
        return (self.one, self.other) if forth else (self.other, self.one)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, (1, 64), (2, 32)), id="heads-divide"),
        pytest.param((1, (1, 32), (2, 64)), id="heads-replicated"),
        pytest.param((2, (2, 32), (2, 32)), id="equal"),
    ],
)
def engines(
    request: pytest.FixtureRequest, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """KV heads of the model; ranks and tokens of a block of each engine."""
    kv_heads, one, other = request.param
    folder = tmp_path_factory.mktemp("tp")
    faults = folder / "faults"
    faults.mkdir()
    model = make_tiny_model(folder / "model", kv_heads=kv_heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(faults))
        with (
            _server(model, etcd, one, folder / "one.log") as first,
            _server(model, etcd, other, folder / "other.log") as second,
        ):
            first.wait()
            second.wait()
            yield Engines(first, second, kv_heads, faults)


def _server(model: Path, etcd: EtcdServer, sizes: tuple[int, int], log: Path) -> VllmServer:
    tp_size, block_size = sizes
    config = transfer_config(
        etcd.endpoint,
        "kv_both",
        kv_connector="CorruptingConnector",
        kv_connector_module_path="tests.support.connector.corrupting_connector",
        # Up to four processes load their first kernels on two cores while they are first connected,
        # and can miss every renewal of a lease of 5 s.
        discovery={
            "kind": "etcd",
            "endpoints": [etcd.endpoint],
            "cluster": "stock",
            "lease_ttl_s": 20,
        },
        transfer={"ticket_ttl_s": 60.0, "digests": True, "connect_timeout_s": 15.0},
    )
    return VllmServer(
        model,
        [
            *("--dtype", "float32", "--max-model-len", "1024", "--block-size", str(block_size)),
            *("--tensor-parallel-size", str(tp_size)),
            *("--distributed-executor-backend", "mp" if tp_size > 1 else "uni"),
            *("--kv-transfer-config", config),
        ],
        log,
    )


def _all_free(server: VllmServer) -> bool:
    """Whether vLLM's scheduler got back every block, which takes word of every rank."""
    return server.metric("vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])
def test_same_text_as_one_engine(engines: Engines, forth: bool, length: int) -> None:
    prefill, decode = engines.direction(forth)
    prompt = make_prompt(length, salt=length + 10_000 * forth)
    expected = colocated(engines.one, prompt)
    counters = Counters(prefill, decode)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    changes = counters.changes()
    assert changes.get("tokens") == length, changes
    assert changes["ok"] == 1
    assert changes.get("computed", 0) <= 1
    assert changes["bytes"] >= length * engines.kv_heads * BYTES_OF_A_TOKEN
    wait_for(lambda: counters.changes().get("released") == 1)
    wait_for(lambda: _all_free(prefill))


@pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])
def test_part_of_an_owners_block_is_in_the_prefix_cache(engines: Engines, forth: bool) -> None:
    prefill, decode = engines.direction(forth)
    shared, tail = make_prompt(96, salt=77 + forth), make_prompt(75, salt=79 + forth)
    decode.complete([*shared, 3])
    expected = colocated(engines.one, shared + tail)
    counters = Counters(prefill, decode)
    ticket = prefill_ticket(prefill, shared + tail)
    answer = decode.complete(shared + tail, kv_transfer_params=ticket)
    assert answer["choices"][0]["text"] == expected
    changes = counters.changes()
    assert changes["ok"] == 1, changes
    assert changes["tokens"] in (len(tail), len(tail) + 32)
    wait_for(lambda: _all_free(prefill))


@pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])
def test_a_ticket_that_is_not_read_is_given_back_by_all_ranks(
    engines: Engines, forth: bool
) -> None:
    prefill, decode = engines.direction(forth)
    prompt = make_prompt(129, salt=88 + forth)
    expected = decode.complete(prompt)["choices"][0]["text"]
    counters = Counters(prefill, decode)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    wait_for(lambda: counters.changes().get("released") == 1)
    assert counters.changes()["forfeited"] == 1
    wait_for(lambda: _all_free(prefill))


@pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])
def test_one_changed_bit_on_one_rank_and_no_rank_uses_the_prompt(
    engines: Engines, forth: bool
) -> None:
    prefill, decode = engines.direction(forth)
    for rank in range(decode.tp_size):
        prompt = make_prompt(200, salt=99 + 2 * rank + forth)
        expected = colocated(engines.one, prompt)
        counters = Counters(prefill, decode)
        ticket = prefill_ticket(prefill, prompt)
        armed = engines.faults / str(rank)
        armed.touch()
        answer = decode.complete(prompt, kv_transfer_params=ticket)
        assert not armed.exists()
        assert answer["choices"][0]["text"] == expected
        changes = counters.changes()
        assert changes["corrupted"] == 1, changes
        assert changes["recomputed"] == len(prompt) - 1
        assert "ok" not in changes
        assert "tokens" not in changes
        wait_for(lambda: _all_free(prefill))
