"""What this connector cannot hand over, found when vLLM starts and not at the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from transfer.errors import ConfigurationError, Phase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

WHERE = "docs/transfer.md says what it would take"


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises if a prompt's KV of this model and these settings is not what Baton hands over.

    Raises:
        ConfigurationError: names the model's property or the setting.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "recompute":
        raise ConfigurationError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy}, must be recompute where "
            f"kv_role is {transfer.kv_role}: vLLM would fail each request whose KV cannot be "
            'fetched. Set "kv_load_failure_policy": "recompute" in kv_transfer_config',
            phase=Phase.REGISTER,
        )
    refuse_unsupported_model(vllm_config)
    if reason := _unsupported_cache(kv_cache_config):
        raise _unsupported(reason)


def refuse_unsupported_model(vllm_config: VllmConfig) -> None:
    """The part of :func:`refuse_unsupported` that can be told without a layout of the KV cache.

    Raises:
        ConfigurationError: names the model's property or the setting.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (value := getattr(parallel, name)) > 1:
            raise _unsupported(f"{name}={value}, only 1")
    if model.use_mla:
        raise _unsupported(f"multi-head latent attention (MLA), as {model.model} has it")
    if model.is_hybrid:
        raise _unsupported(f"Mamba and other hybrids, such as {model.model}")
    if model.is_encoder_decoder:
        raise _unsupported(f"encoders beside a decoder, as {model.model} has them")


def _unsupported(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"BatonConnector does not support {reason}; {WHERE}", phase=Phase.REGISTER
    )


def _unsupported_cache(kv_cache_config: KVCacheConfig) -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) > 1:
        return f"models with {len(groups)} KV cache groups"
    for group in groups:
        whole = group.kv_cache_spec
        specs = (
            list(whole.kv_cache_specs.values())
            if isinstance(whole, UniformTypeKVCacheSpecs)
            else [whole]
        )
        for spec in specs:
            # Others drop blocks that a window has left behind, or keep a state instead of tokens.
            if not isinstance(spec, FullAttentionSpec) or isinstance(spec, MLAAttentionSpec):
                kind = type(spec).__name__.removesuffix("Spec")
                return f"models whose KV cache is all of kind {kind}, only FullAttention"
            if spec.tokens_per_state != 1:
                return f"KV caches with {spec.tokens_per_state} tokens in one state"
    return None
