"""What is refused when vLLM starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from transfer.connector.limits import refuse_unsupported
from transfer.errors import ConfigurationError

SIZES: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.float16,
}
MODEL = {"model": "a/model", "use_mla": False, "is_hybrid": False, "is_encoder_decoder": False}
FULL = FullAttentionSpec(**SIZES)


def role(name: Any, **changes: Any) -> KVTransferConfig:
    """vLLM's own, with its own defaults."""
    return KVTransferConfig(kv_connector="BatonConnector", kv_role=name, **changes)


def start(
    *specs: KVCacheSpec,
    model: dict[str, bool] | None = None,
    transfer: KVTransferConfig | None = None,
    **parallel: int,
) -> None:
    """Checks the fields of vLLM's configuration that the connector looks at."""
    sizes = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        **parallel,
    }
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        model_config=SimpleNamespace(**{**MODEL, **(model or {})}),
        kv_transfer_config=transfer or role("kv_both", kv_load_failure_policy="recompute"),
    )
    cache: Any = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    )
    refuse_unsupported(config, cache)


def test_full_attention_is_supported_also_where_it_stands_for_a_window() -> None:
    start(FULL)
    start(FullAttentionSpec(**SIZES, sliding_window=128))


@pytest.mark.parametrize(
    ("specs", "changes", "message"),
    [
        ([FULL, FULL], {}, "models with 2 KV cache groups"),
        ([FULL], {"model": {"use_mla": True}}, "multi-head latent attention .*, as a/model"),
        ([FULL], {"model": {"is_hybrid": True}}, "Mamba and other hybrids, such as a/model"),
        ([FULL], {"model": {"is_encoder_decoder": True}}, "encoders .* as a/model"),
        ([MLAAttentionSpec(**SIZES)], {}, "of kind MLAAttention, only FullAttention"),
        ([SlidingWindowSpec(**SIZES, sliding_window=128)], {}, "of kind SlidingWindow, only"),
        ([FullAttentionSpec(**SIZES, tokens_per_state=4)], {}, "4 tokens in one state"),
        ([FULL], {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2, only 1"),
        ([FULL], {"decode_context_parallel_size": 2}, "decode_context_parallel_size=2, only 1"),
        ([FULL], {"prefill_context_parallel_size": 4}, "prefill_context_parallel_size=4, only 1"),
    ],
)
def test_the_rest_is_refused_with_its_name(
    specs: list[KVCacheSpec], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"does not support .*{message}.*docs/transfer"):
        start(*specs, **changes)


@pytest.mark.parametrize("name", ["kv_consumer", "kv_both"])
@pytest.mark.parametrize("changes", [{}, {"kv_load_failure_policy": "fail"}])
def test_a_reader_must_recompute_what_it_cannot_load(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        start(FULL, transfer=role(name, **changes))

    assert caught.value.message.startswith(
        f"kv_load_failure_policy is fail, must be recompute where kv_role is {name}: "
    )
    start(FULL, transfer=role(name, kv_load_failure_policy="recompute"))


def test_who_only_prefills_loads_nothing() -> None:
    start(FULL, transfer=role("kv_producer"))
