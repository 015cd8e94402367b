"""Settings that are right one by one and wrong together."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import Settings, parse_settings
from tests.support.servers.app_settings import GOOD, changed, fault


def test_replicas_and_autoscaling_exclude_each_other() -> None:
    assert fault(changed("decode.replicas", 2)) == (
        "decode: set either replicas or autoscaling, not both"
    )


def test_autoscaling_range_must_not_be_empty() -> None:
    line = fault(changed("decode.autoscaling.min_replicas", 4))

    assert line == "decode.autoscaling: min_replicas (4) is above max_replicas (3)"


def test_sides_may_differ_in_tensor_parallel_size() -> None:
    settings = parse_settings(changed("prefill.tensor_parallel_size", 2))

    assert settings.prefill.tensor_parallel_size == 2
    assert settings.decode.tensor_parallel_size == 1


def test_sides_may_differ_in_block_size_if_one_is_a_multiple_of_the_other() -> None:
    args = changed("prefill.engine.block_size", 64)
    args["decode"]["engine"] = {"block_size": 32}
    assert isinstance(parse_settings(args), Settings)

    args["decode"]["engine"] = {"block_size": 48}
    assert fault(args) == (
        "args: block_size is 64 for prefill and 48 for decode; one must be a multiple of the other"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("dtype", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "quantization", "max_model_len"),
        *("revision", "hf_overrides", "hf_config_path"),
    ],
)
def test_sides_must_not_differ_in_what_blocks_mean(name: str) -> None:
    line = fault(changed(f"prefill.engine.{name}", "other"))

    assert line.startswith(f"args: {name} is other for prefill and ")

    both = changed(f"prefill.engine.{name}", "other")
    both["decode"]["engine"] = {name: "other"}
    assert isinstance(parse_settings(both), Settings)


def test_attention_backends_must_not_differ_where_both_are_named() -> None:
    assert isinstance(parse_settings(changed("prefill.engine.attention_backend", "A")), Settings)
    both = changed("prefill.engine.attention_backend", "A")
    both["decode"]["engine"] = {"attention_backend": "B"}

    assert fault(both).startswith("args: attention_backend is A for prefill and B for decode")


@pytest.mark.parametrize(
    "config", [{"method": "eagle", "model": "x"}, {"model": "x"}, {"method": "mtp"}]
)
def test_speculation_with_layers_of_its_own_must_be_on_both_sides(config: dict[str, Any]) -> None:
    line = fault(changed("decode.engine.speculative_config", config))

    assert line.startswith("args: speculative_config has no layers for prefill and ")
    both = changed("decode.engine.speculative_config", config)
    both["prefill"]["engine"] = {"speculative_config": config}
    assert isinstance(parse_settings(both), Settings)


def test_speculation_from_the_text_may_be_on_one_side() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3}

    assert isinstance(parse_settings(changed("decode.engine.speculative_config", config)), Settings)


def test_prompts_are_kept_apart_by_keys_only_if_there_are_keys() -> None:
    assert parse_settings(GOOD).router.cache_salt_by_key is False
    args = changed("router.cache_salt_by_key", True)
    assert parse_settings(args).router.cache_salt_by_key is True
    args["router"]["api_keys"] = []
    assert fault(args) == ("router: cache_salt_by_key is set, but there are no api_keys to go by")


@pytest.mark.parametrize("section", ["engine", "prefill.engine", "decode.engine"])
def test_answers_of_all_keys_are_not_drafted_from_when_keys_are_kept_apart(section: str) -> None:
    config: dict[str, Any] = {"method": "suffix"}
    args = changed(f"{section}.speculative_config", config)
    assert isinstance(parse_settings(args), Settings)

    args["router"]["cache_salt_by_key"] = True
    assert "set suffix_decoding_max_cached_requests to 0" in fault(args)
    config["suffix_decoding_max_cached_requests"] = 0
    assert isinstance(parse_settings(args), Settings)


def test_side_may_repeat_what_both_have() -> None:
    settings = parse_settings(changed("prefill.engine.dtype", "bfloat16"))

    assert settings.prefill.engine["dtype"] == "bfloat16"


def test_gpu_type_without_gpus_is_refused() -> None:
    line = fault(changed("decode.resources", {"accelerator_type": "H100"}))

    assert line.startswith("decode.resources: accelerator_type is H100, but gpus_per_worker is 0")


@pytest.mark.parametrize("name", ["CPU", "GPU"])
def test_standard_resources_are_not_custom_ones(name: str) -> None:
    line = fault(changed("decode.resources", {"custom": {name: 1}}))

    assert line.startswith(f"decode.resources.custom: {name} is not a custom resource")


def test_worker_must_reserve_something() -> None:
    line = fault(changed("decode.resources", {"cpus_per_worker": 0}))

    assert line.startswith("decode.resources: set cpus_per_worker or gpus_per_worker")
