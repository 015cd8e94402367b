"""What cannot be handed over, or not safely, as vLLM's own server tells of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers.vllm_server import VllmServer

pytestmark = pytest.mark.timeout(300)

GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "layer_types": ["mamba", "attention"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}
TRANSFER = {
    "kv_connector": "BatonConnector",
    "kv_connector_module_path": "transfer.connector",
    "kv_role": "kv_producer",
}


def test_a_hybrid_ends_the_server_with_a_line_of_the_connector(tmp_path: Path) -> None:
    model = tmp_path / "granite"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(GRANITE))
    server = VllmServer(
        model,
        [
            *("--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "256"),
            *("--kv-transfer-config", json.dumps(TRANSFER)),
        ],
        tmp_path / "log",
    )
    refusal = f"BatonConnector does not support Mamba and other hybrids, such as {model}; docs/"

    with pytest.raises(RuntimeError, match=re.escape(refusal)), server:
        server.wait()


@pytest.mark.parametrize("policy", [{}, {"kv_load_failure_policy": "fail"}], ids=["none", "fail"])
def test_decode_that_would_not_compute_what_cannot_be_fetched_does_not_start(
    tiny_model: Path, tmp_path: Path, policy: dict[str, str]
) -> None:
    """By vLLM's default, too."""
    transfer = {**TRANSFER, "kv_role": "kv_consumer", **policy}
    server = VllmServer(
        tiny_model,
        [
            *("--dtype", "float32", "--max-model-len", "256"),
            *("--kv-transfer-config", json.dumps(transfer)),
        ],
        tmp_path / "log",
    )
    refusal = "kv_load_failure_policy is fail, must be recompute where"

    with pytest.raises(RuntimeError, match=refusal), server:
        server.wait()
