"""Engines whose settings differ, in what changes the KV cache and in what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def _server(
    model: Path, etcd: EtcdServer, role: str, log: Path, *arguments: str, dtype: str = "float32"
) -> VllmServer:
    return VllmServer(
        model,
        [
            *("--dtype", dtype, "--max-model-len", "1024", "--block-size", "32"),
            *("--kv-transfer-config", transfer_config(etcd.endpoint, role)),
            *arguments,
        ],
        log,
    )


@pytest.fixture(scope="module")
def prefill(
    tiny_model: Path, etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("prefill") / "log"
    with _server(tiny_model, etcd, "kv_producer", log) as server:
        server.wait()
        yield server


def test_decode_alone_may_speculate_from_the_text(
    prefill: VllmServer, tiny_model: Path, etcd: EtcdServer, tmp_path: Path
) -> None:
    guesses = '"prompt_lookup_max": 2, "prompt_lookup_min": 1'
    config = f'{{"method": "ngram", "num_speculative_tokens": 3, {guesses}}}'
    arguments = ("--speculative-config", config)
    log = tmp_path / "log"
    with _server(tiny_model, etcd, "kv_consumer", log, *arguments) as decode:
        decode.wait()
        counters = Counters(prefill, decode)
        lengths = (2, 33, 64, 300)
        for length in lengths:
            prompt = make_prompt(length, salt=length)
            # Of two tokens, so that the text repeats itself and guesses are right.
            limits = {"max_tokens": 40, "allowed_token_ids": prompt[:2]}
            expected = colocated(prefill, prompt, **limits)
            ticket = prefill_ticket(prefill, prompt)
            answer = decode.complete(prompt, kv_transfer_params=ticket, **limits)
            assert answer["choices"][0]["text"] == expected
        wait_for(lambda: counters.pinned() == 0)
        changes = counters.changes()
        assert changes["tokens"] == sum(lengths)
        assert changes["released"] == changes["ok"] == len(lengths)
        assert changes.get("recomputed", 0) == 0
        assert decode.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_what_differs_is_named_in_the_log(
    prefill: VllmServer, tiny_model: Path, etcd: EtcdServer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with _server(tiny_model, etcd, "kv_consumer", log, dtype="bfloat16") as decode:
        decode.wait()
        prompt = make_prompt(100, salt=7)
        expected = colocated(decode, prompt)
        counters = Counters(prefill, decode)
        answer = decode.complete(prompt, kv_transfer_params=prefill_ticket(prefill, prompt))
        assert answer["choices"][0]["text"] == expected
        assert counters.changes()["refused"] == 1
    (line,) = [line for line in log.read_text().splitlines() if "refused" in line]
    assert "the two engines differ in: dtype" in line
    assert "weights" not in line
