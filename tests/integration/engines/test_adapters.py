"""Adapters that have only their name in common, at two stock vLLM servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models.tiny_adapter import make_tiny_adapter
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.stock_servers import (
    PREFILL,
    Counters,
    make_prompt,
    transfer_config,
    wait_for,
)
from tests.support.servers.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def pair(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmServer, VllmServer]]:
    """``twin`` has the same weights at both servers, ``rival`` others."""
    folder = tmp_path_factory.mktemp("adapters")
    twin, mine, theirs = (make_tiny_adapter(folder / f"lora-{seed}", seed) for seed in range(3))
    adapters = {
        "kv_producer": {"twin": twin, "rival": mine},
        "kv_consumer": {"twin": shutil.copytree(twin, folder / "copy"), "rival": theirs},
    }

    def server(role: str) -> VllmServer:
        return VllmServer(
            tiny_model,
            [
                *("--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"),
                *("--kv-transfer-config", transfer_config(etcd.endpoint, role)),
                *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"),
                *(f"{name}={path}" for name, path in adapters[role].items()),
            ],
            folder / f"{role}.log",
        )

    with EtcdServer() as etcd, server("kv_producer") as prefill, server("kv_consumer") as decode:
        prefill.wait()
        decode.wait()
        yield prefill, decode


@pytest.mark.parametrize(("model", "is_handed_over"), [("twin", True), ("rival", False)])
def test_weights_decide_and_not_names(
    pair: tuple[VllmServer, VllmServer], model: str, is_handed_over: bool
) -> None:
    prefill, decode = pair
    texts, own = [], []
    counters = Counters(*pair)
    prompts = [make_prompt(150, salt=number) for number in range(4)]
    for prompt in prompts:
        answer = prefill.complete(prompt, model=model, max_tokens=1, kv_transfer_params=PREFILL)
        ticket = answer["kv_transfer_params"]
        read = decode.complete(prompt, model=model, kv_transfer_params=ticket)
        texts.append(read["choices"][0]["text"])
    wait_for(lambda: counters.pinned() == 0)
    changes = counters.changes()
    for number, prompt in enumerate(prompts):
        alone = decode.complete(prompt, model=model, cache_salt=f"alone-{number}")
        own.append(alone["choices"][0]["text"])
    base = decode.complete(prompts[0])["choices"][0]["text"]

    assert texts == own
    assert base != own[0]
    if is_handed_over:
        assert changes["ok"] == len(prompts)
        assert changes["tokens"] == sum(map(len, prompts))
    else:
        assert changes["refused"] == len(prompts)
        assert "tokens" not in changes
