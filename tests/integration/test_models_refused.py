"""Models whose prompts cannot be handed over, as vLLM's own server tells of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm_server import VllmServer

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
