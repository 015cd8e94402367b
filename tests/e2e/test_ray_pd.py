"""The connector under another orchestrator: Ray Serve LLM's own prefill/decode application."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.load.reference import reference_texts
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.ray_app import ray_app
from tests.support.servers.vllm_server import get, metric, post

pytestmark = pytest.mark.timeout(720)

MAX_MODEL_LEN = 1024
LENGTHS = (5, 32, 167, 700)


def _config(model: Path, etcd: EtcdServer, role: str) -> dict[str, Any]:
    return {
        "model_loading_config": {"model_id": "tiny", "model_source": str(model)},
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
        "log_engine_metrics": True,
        "engine_kwargs": {
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "block_size": 32,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "kv_transfer_config": {
                "kv_connector": "BatonConnector",
                "kv_connector_module_path": "transfer.connector",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "discovery": {"kind": "etcd", "endpoints": [etcd.endpoint]},
                    "die_with_parent": True,
                },
            },
        },
    }


@dataclass(frozen=True)
class App:
    url: str
    metrics: str

    def count(self, name: str) -> float:
        code, text = get(self.metrics)
        assert code == 200
        return metric(text, name)


@pytest.fixture(scope="module")
def app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with EtcdServer() as etcd:
        application = {
            "name": "pd",
            "route_prefix": "/",
            "import_path": "ray.serve.llm:build_pd_openai_app",
            "args": {
                "prefill_config": _config(tiny_model, etcd, "kv_producer"),
                "decode_config": _config(tiny_model, etcd, "kv_consumer"),
                "ingress_deployment_config": {"ray_actor_options": {"num_cpus": 0.1}},
            },
        }
        with ray_app(application, tmp_path_factory.mktemp("pd")) as (url, metrics):
            yield App(url, metrics)


def test_same_text_as_one_engine_and_the_blocks_moved(
    app: App, tiny_model: Path, tmp_path: Path
) -> None:
    prompts = [random.Random(length).choices(range(3, 200), k=length) for length in LENGTHS]
    expected = reference_texts(
        str(tiny_model), prompts, max_tokens=16, max_model_len=MAX_MODEL_LEN, folder=tmp_path
    )

    answers = [
        post(
            f"{app.url}/v1/completions",
            {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0},
        )
        for prompt in prompts
    ]

    assert [answer["choices"][0]["text"] for answer in answers] == expected
    for _ in range(40):  # Ray exports metrics every few seconds
        if app.count("ray_baton_transfer_tokens_total") >= sum(LENGTHS):
            break
        time.sleep(0.5)
    assert app.count("ray_baton_transfer_tokens_total") == sum(LENGTHS)
    assert app.count("ray_baton_transfer_bytes_total") > 0
    assert app.count("ray_baton_recomputed_tokens_total") == 0
