"""``P2PHANDSHAKE``: two stock servers that know each other's URLs and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from serve_app.launch.surroundings import free_ports
from tests.support.servers.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(300)


def _server(model: Path, kv_role: str, folder: Path) -> VllmServer:
    config = {
        "kv_connector": "BatonConnector",
        "kv_connector_module_path": "transfer.connector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
    }
    arguments = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"]
    arguments += ["--kv-transfer-config", json.dumps(config)]
    return VllmServer(model, arguments, folder / f"{kv_role}.log")


def test_two_servers_without_etcd(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = free_ports(2)
    mooncake = tmp_path / "mooncake.json"
    document = {
        "local_url": f"127.0.0.1:{local}",
        "remote_url": f"127.0.0.1:{remote}",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
    }
    mooncake.write_text(json.dumps(document))
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))
    monkeypatch.setenv("VLLM_DISTRIBUTED_KV_ROLE", "producer")
    with _server(tiny_model, "kv_producer", tmp_path) as prefill:
        monkeypatch.setenv("VLLM_DISTRIBUTED_KV_ROLE", "consumer")
        with _server(tiny_model, "kv_consumer", tmp_path) as decode:
            prefill.wait()
            decode.wait()
            for length in (33, 700):
                prompt = random.Random(length).choices(range(3, 200), k=length)
                ticket: dict[str, Any] = prefill.complete(
                    prompt,
                    max_tokens=1,
                    kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False},
                )["kv_transfer_params"]
                answer = decode.complete(prompt, kv_transfer_params=ticket)
                alone = decode.complete(prompt, cache_salt="alone")
                assert answer["choices"][0]["text"] == alone["choices"][0]["text"]
            assert decode.metric("baton:transfer_tokens_total") == 733
            assert decode.metric("baton:transfer_bytes_total") > 0
            assert prefill.metric("baton:pinned_blocks") == 0
