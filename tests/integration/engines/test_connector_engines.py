"""The connector between two stock vLLM servers: no Ray, real etcd, real engines, real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from tests.support.network.meddling_relay import Meddler, MeddlingRelay, greet_only
from tests.support.network.raw_connections import Message, welcome
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import admin
from tests.support.servers.stock_servers import (
    PREFILL,
    Counters,
    colocated,
    make_prompt,
    prefill_ticket,
    transfer_config,
    wait_for,
)
from tests.support.servers.vllm_server import VllmServer, get, post
from transfer.types import PeerId, PeerInfo

pytestmark = pytest.mark.timeout(300)

BLOCK = 32  # the CPU attention kernel takes multiples of 32


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def _server(
    model: Path, etcd: EtcdServer, role: str, folder: Path, *arguments: str, **extra: Any
) -> VllmServer:
    return VllmServer(
        model,
        [
            *("--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK)),
            *("--kv-transfer-config", transfer_config(etcd.endpoint, role, **extra)),
            *arguments,
        ],
        folder / f"{role}.log",
    )


@pytest.fixture(scope="module")
def pair(
    tiny_model: Path, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    """Stock engines, which wait for the model as they would if its blocks were in device memory
    that others reach; engines of other tests do not."""
    folder = tmp_path_factory.mktemp("stock")
    with (
        _server(tiny_model, etcd, "kv_producer", folder, host_staging="never") as prefill,
        _server(tiny_model, etcd, "kv_consumer", folder, host_staging="never") as decode,
    ):
        prefill.wait()
        decode.wait()
        yield prefill, decode


def _texts(choices: list[dict[str, Any]]) -> list[str]:
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


@pytest.mark.parametrize(
    "length",
    [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3, 700],
    ids=lambda length: f"{length}-tokens",
)
def test_same_text_as_one_engine(pair: tuple[VllmServer, VllmServer], length: int) -> None:
    prefill, decode = pair
    prompt = make_prompt(length, salt=length)
    expected = colocated(decode, prompt)
    counters = Counters(*pair)
    ticket = prefill_ticket(prefill, prompt)
    assert ticket["num_tokens"] == length
    assert len(ticket["remote_block_ids"]) == -(-length // BLOCK)
    answer = decode.complete(prompt, kv_transfer_params=ticket)
    assert answer["choices"][0]["text"] == expected
    wait_for(lambda: counters.pinned() == 0)
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
    shared, tail = make_prompt(6 * BLOCK, salt=901), make_prompt(2 * BLOCK + 5, salt=902)
    decode.complete([*shared, 3])
    prompt = shared + tail
    expected = colocated(decode, prompt)
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["tokens"] == len(tail)
    assert changes.get("computed", 0) <= 1


def test_full_local_hit_reads_nothing_and_frees_the_owner(
    pair: tuple[VllmServer, VllmServer],
) -> None:
    prefill, decode = pair
    prompt = make_prompt(4 * BLOCK + 1, salt=903)
    expected = decode.complete(prompt)["choices"][0]["text"]
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["forfeited"] == 1
    assert changes["released"] == 1
    assert "bytes" not in changes


def test_n_samples_share_one_ticket(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = pair
    prompt = make_prompt(3 * BLOCK + 7, salt=904)
    sampling = {"n": 3, "seed": 11, "temperature": 0.8}
    expected = decode.complete(prompt, cache_salt="reference", **sampling)["choices"]
    counters = Counters(*pair)
    offered = prefill.complete(prompt, max_tokens=1, kv_transfer_params={**PREFILL, "readers": 3})
    answer = decode.complete(prompt, kv_transfer_params=offered["kv_transfer_params"], **sampling)
    assert _texts(answer["choices"]) == _texts(expected)
    assert len(set(_texts(expected))) == 3
    wait_for(lambda: counters.pinned() == 0)
    assert counters.changes()["released"] == 1


@pytest.mark.parametrize(
    ("field", "value", "outcome"),
    [
        ("secret", "0" * 32, "refused"),
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
    prompt = make_prompt(2 * BLOCK + 9, salt=10_000 + sum(field.encode()))
    expected = colocated(decode, prompt)
    ticket = prefill_ticket(prefill, prompt)
    if field == "remote_block_ids":
        value = [block + 1 for block in ticket["remote_block_ids"]]
    # On a first connection neither end could tell which of them has the wrong secret.
    other = make_prompt(2 * BLOCK + 9, salt=20_000 + sum(field.encode()))
    decode.complete(other, kv_transfer_params=prefill_ticket(prefill, other))
    counters = Counters(*pair)
    answer = decode.complete(prompt, kv_transfer_params={**ticket, field: value})
    assert answer["choices"][0]["text"] == expected
    changes = counters.changes()
    assert changes.get(outcome) == 1, changes
    assert changes["recomputed"] == len(prompt) - 1
    assert "tokens" not in changes


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"vllm_xargs": {"kv_transfer_params": 5}},
        {"vllm_xargs": {"kv_transfer_params": ["do_remote_decode", 1]}},
        {"kv_transfer_params": {"do_remote_decode": True, "handoff_id": ["a"], "readers": {}}},
    ],
    ids=["text", "number", "list", "wrong kinds inside"],
)
def test_what_is_no_ticket_ends_no_engine(
    pair: tuple[VllmServer, VllmServer], body: dict[str, Any]
) -> None:
    prefill, decode = pair
    prompt = make_prompt(2 * BLOCK + 3, salt=30_000 + len(str(body)))
    expected = colocated(decode, prompt)

    for server in pair:
        answer = server.complete(prompt, **body)
        assert answer["choices"][0]["text"] == expected
        assert get(f"{server.url}/health")[0] == 200

    prompt = make_prompt(2 * BLOCK + 3, salt=31_000 + len(str(body)))
    counters = Counters(*pair)
    decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    wait_for(lambda: counters.changes().get("ok") == 1)


@pytest.mark.parametrize("field", ["prompt_hash", "layout_hash"])
def test_the_owner_of_a_refused_ticket_is_told_at_once(
    pair: tuple[VllmServer, VllmServer], field: str
) -> None:
    """Its blocks do not stay until it expires, after 8 s."""
    prefill, decode = pair
    prompt = make_prompt(2 * BLOCK + 9, salt=30_000 + sum(field.encode()))
    counters = Counters(*pair)
    wait_for(lambda: counters.pinned() == 0, 20.0)  # what other tests left
    ticket = prefill_ticket(prefill, prompt)
    counters = Counters(*pair)
    assert counters.pinned() == 3
    decode.complete(prompt, kv_transfer_params={**ticket, field: "0" * 64})
    wait_for(lambda: counters.pinned() == 0, 2.0)
    changes = counters.changes()
    assert changes["refused"] == changes["released"] == 1, changes
    assert "expired" not in changes


def test_a_ticket_cannot_be_replayed(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = pair
    prompt = make_prompt(2 * BLOCK + 4, salt=905)
    ticket = prefill_ticket(prefill, prompt)
    first = decode.complete(prompt, kv_transfer_params=ticket)
    post(f"{decode.url}/reset_prefix_cache", {})
    counters = Counters(*pair)
    again = decode.complete(prompt, kv_transfer_params=ticket)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert counters.changes()["refused"] == 1


def test_an_unread_ticket_expires(pair: tuple[VllmServer, VllmServer]) -> None:
    prefill, _ = pair
    counters = Counters(*pair)
    wait_for(lambda: counters.pinned() == 0, 20.0)
    prefill_ticket(prefill, make_prompt(3 * BLOCK, salt=907))
    wait_for(lambda: counters.pinned() == 3, 5.0)
    wait_for(lambda: counters.pinned() == 0, 20.0)
    assert counters.changes()["expired"] >= 1


def test_an_owner_whose_record_was_overwritten_goes_on(
    etcd: EtcdServer, pair: tuple[VllmServer, VllmServer]
) -> None:
    prefill, decode = pair
    name = "baton:overwritten_records_total"
    before = prefill.metric(name), decode.metric(name)
    prompt = make_prompt(3 * BLOCK, salt=905)
    ticket = prefill_ticket(prefill, prompt)
    key = f"/baton/stock/workers/{ticket['remote_engine_id']}/0"
    with admin(etcd) as client:
        value, meta = client.get(key)
        client.put(key, b"garbage")
        wait_for(lambda: client.get(key)[0] == value, 5.0)
        assert client.get(key)[1].lease_id == meta.lease_id
    prompt = make_prompt(3 * BLOCK, salt=906)
    counters = Counters(*pair)
    decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    wait_for(lambda: counters.changes().get("ok") == 1)
    wait_for(lambda: prefill.metric(name) == before[0] + 1)
    assert decode.metric(name) == before[1]


def _impostor(message: Message) -> bytes:
    """Greets in another's name without a secret of his."""
    info = PeerInfo(PeerId("owner", 0), "owner-1", "same", b"layout")
    return welcome(info, message.body, "0" * 32)[0]


@pytest.mark.parametrize("meddle", [_impostor, greet_only], ids=["greeting", "true greeting"])
def test_a_false_owner_at_the_address_of_a_record(
    etcd: EtcdServer, pair: tuple[VllmServer, VllmServer], meddle: Meddler
) -> None:
    """It gives blocks and confirms them without the secret; then the true one's record is back."""
    prefill, decode = pair
    prompt = make_prompt(3 * BLOCK + 5, salt=40_000 + len(meddle.__name__))
    expected = colocated(decode, prompt)
    ticket = prefill_ticket(prefill, prompt)
    key = f"/baton/stock/workers/{ticket['remote_engine_id']}/0"
    counters = Counters(*pair)

    with admin(etcd) as client:
        true = client.get(key)[0]
        record = json.loads(true)
        with MeddlingRelay(record["addresses"][0], meddle) as relay:
            # What no reader understands cuts their connections. The owner mends the first one at
            # once and looks again when it renews its lease, and so a third one stands until then.
            for _ in range(2):
                client.put(key, b"garbage")
                wait_for(lambda: client.get(key)[0] == true)
            ticket = prefill_ticket(prefill, prompt)
            client.put(key, json.dumps({**record, "addresses": [relay.address]}).encode())
            answer = decode.complete(prompt, kv_transfer_params=ticket)
            assert relay.messages
        wait_for(lambda: client.get(key)[0] == true)

    assert answer["choices"][0]["text"] == expected
    assert ticket["secret"].encode() not in relay.seen
    changes = counters.changes()
    assert changes["unproven"] == 1, changes
    assert changes["recomputed"] == len(prompt) - 1
    assert not {"tokens", "ok"} & changes.keys()
    # The reader tells the true owner, once its record is back, that it lets go.
    wait_for(lambda: counters.pinned() == 0)

    prompt = make_prompt(3 * BLOCK + 5, salt=41_000 + len(meddle.__name__))
    counters = Counters(*pair)
    decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    wait_for(lambda: counters.changes().get("ok") == 1)


def test_the_owner_dies_after_the_ticket(
    pair: tuple[VllmServer, VllmServer],
    tiny_model: Path,
    etcd: EtcdServer,
    tmp_path: Path,
) -> None:
    _, decode = pair
    with _server(tiny_model, etcd, "kv_producer", tmp_path) as other:
        other.wait()
        prompt = make_prompt(4 * BLOCK + 2, salt=908)
        expected = colocated(decode, prompt)
        ticket = prefill_ticket(other, prompt)
        other.kill()
        counters = Counters(pair[0], decode)
        answer = decode.complete(prompt, kv_transfer_params=ticket)
    assert answer["choices"][0]["text"] == expected
    assert counters.changes()["failed"] == 1


BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 32 * 4
"""Of the tiny model: layers, KV heads, tokens, key and value of 32 floats."""


def _staged(host_bytes: int) -> dict[str, Any]:
    transfer = {"ticket_ttl_s": 8.0, "connect_timeout_s": 15.0, "digests": True}
    return {
        "host_staging": "always",
        "transfer": {**transfer, "host_staging_bytes": host_bytes},
    }


@pytest.fixture(scope="module")
def staged(
    tiny_model: Path, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    """What engines with device memory do, here with host memory on both sides: room for 64 blocks
    at prefill, and for 32, which is one prompt of 1024 tokens, at decode, which has two ranks."""
    folder = tmp_path_factory.mktemp("staged")
    ranks = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")
    with (
        _server(tiny_model, etcd, "kv_producer", folder, **_staged(64 * BLOCK_BYTES)) as prefill,
        _server(
            tiny_model, etcd, "kv_consumer", folder, *ranks, **_staged(32 * BLOCK_BYTES // 2)
        ) as decode,
    ):
        prefill.wait()
        decode.wait()
        yield prefill, decode


@pytest.mark.parametrize("length", [2, BLOCK, 5 * BLOCK + 3, 1000])
def test_same_text_through_slots_in_host_memory(
    staged: tuple[VllmServer, VllmServer], length: int
) -> None:
    prefill, decode = staged
    prompt = make_prompt(length, salt=20_000 + length)
    expected = colocated(decode, prompt)
    counters = Counters(*staged)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected
    wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["tokens"] == length
    assert changes["ok"] == changes["released"] == 1
    assert changes.get("computed", 0) <= 1
    assert changes.get("recomputed", 0) == 0


def test_prompts_wait_for_slots(staged: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = staged
    # Six of 10 blocks fill prefill; decode reads three of them at a time.
    prompts = [make_prompt(9 * BLOCK + 5, salt=24_000 + number) for number in range(8)]
    expected = [colocated(decode, prompt) for prompt in prompts]
    counters = Counters(*staged)
    with ThreadPoolExecutor(len(prompts)) as threads:

        def read(prompt: list[int], ticket: dict[str, Any]) -> str:
            answer = decode.complete(prompt, kv_transfer_params=ticket)
            return str(answer["choices"][0]["text"])

        tickets = [prefill_ticket(prefill, prompt) for prompt in prompts[:6]]
        waiting = [threads.submit(prefill_ticket, prefill, prompt) for prompt in prompts[6:]]
        assert not wait(waiting, 0.5).done
        assert counters.pinned() == 60

        reads = [
            threads.submit(read, prompt, ticket)
            for prompt, ticket in zip(prompts, tickets, strict=False)
        ]
        texts = [reading.result() for reading in reads]
        tickets = [late.result() for late in waiting]
        texts += threads.map(read, prompts[6:], tickets)

    assert texts == expected
    wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    assert changes["ok"] == changes["released"] == len(prompts)
    assert changes["tokens"] == sum(map(len, prompts))
    assert changes.get("recomputed", 0) == changes.get("corrupted", 0) == 0


def test_requests_that_leave_give_their_slots_back(staged: tuple[VllmServer, VllmServer]) -> None:
    prefill, decode = staged
    counters = Counters(*staged)
    for number in range(5):
        prompt = make_prompt(28 * BLOCK, salt=22_000 + number)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 100, "ignore_eos": True}
        ticket = prefill_ticket(prefill, prompt)
        with pytest.raises(TimeoutError):
            post(
                f"{decode.url}/v1/completions",
                {**body, "kv_transfer_params": ticket},
                timeout_s=0.01 * (number + 1),
            )
    wait_for(lambda: counters.pinned() == 0)
    prompt = make_prompt(30 * BLOCK, salt=23_000)
    expected = colocated(decode, prompt)
    answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
    assert answer["choices"][0]["text"] == expected


def test_too_little_host_memory_is_refused_at_start(
    tiny_model: Path, etcd: EtcdServer, tmp_path: Path
) -> None:
    with (
        _server(
            tiny_model, etcd, "kv_producer", tmp_path, **_staged(32 * BLOCK_BYTES - 1)
        ) as prefill,
        pytest.raises(RuntimeError, match=r"transfer\.host_staging_bytes is .* 1048576 would do"),
    ):
        prefill.wait()
