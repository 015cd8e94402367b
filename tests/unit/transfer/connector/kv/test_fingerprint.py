"""What must be equal at two engines, and how a difference is called."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm.config.speculative import MTPModelTypes, SpeculativeMethod

from transfer.connector.kv.fingerprint import FACTORS, differing, hash_of, layout_hash
from transfer.speculation import WITHOUT_KV, drafting_layers, shares_answers


def engine(
    folder: Path, *, weights: bytes = b"w", hf: dict[str, Any] | None = None, **changes: Any
) -> str:
    """The layout hash of an engine whose model is in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    model = SimpleNamespace(
        model=str(folder),
        revision=None,
        hf_config=SimpleNamespace(
            to_dict=lambda: {"rope_theta": 1e4, "_name_or_path": folder, **(hf or {})}
        ),
        quantization=changes.get("quantization"),
        dtype=changes.get("dtype", "bfloat16"),
        get_total_num_hidden_layers=lambda: 2,
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 32,
    )
    config: Any = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        speculative_config=changes.get("speculative"),
    )
    return layout_hash(
        config,
        packing=changes.get("packing", "tokens"),
        attention_backend=changes.get("backend", "FLASH_ATTN"),
    )


def drafting(method: str, folder: Path | None = None) -> Any:
    draft = None if folder is None else SimpleNamespace(model=str(folder), revision=None)
    return SimpleNamespace(method=method, draft_model_config=draft)


def test_equal_engines_have_equal_hashes_wherever_their_model_lies(tmp_path: Path) -> None:
    one, other = engine(tmp_path / "one"), engine(tmp_path / "other")

    assert one == other
    assert len(one) == len(bytes.fromhex(one)) * 2 == 64


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"weights": b"v"}, "weights of the model"),
        ({"hf": {"rope_theta": 1e6}}, "config.json of the model, or what overrides it"),
        ({"quantization": "fp8"}, "quantization"),
        ({"dtype": "float16"}, "dtype"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"backend": "FLASHINFER"}, "attention backend"),
        ({"packing": "amx"}, "attention backend"),
        ({"speculative": drafting("eagle")}, "speculation with layers of its own"),
    ],
)
def test_a_difference_is_named(tmp_path: Path, change: dict[str, Any], factor: str) -> None:
    ours, theirs = engine(tmp_path / "one"), engine(tmp_path / "other", **change)

    assert ours != theirs
    assert differing(ours, theirs) == factor


def test_another_vllm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine(tmp_path / "one")
    monkeypatch.setattr("vllm.__version__", "0.28.0")

    assert differing(ours, engine(tmp_path / "one")) == "version of vLLM or Baton"


def test_several_differences_are_all_named(tmp_path: Path) -> None:
    ours = engine(tmp_path / "one")
    theirs = engine(tmp_path / "other", dtype="float16", cache_dtype="fp8", weights=b"v")

    assert differing(ours, theirs) == "weights of the model; dtype; kv_cache_dtype"


def test_values_do_not_pass_for_those_of_another_factor() -> None:
    values = ["a", *[""] * (len(FACTORS) - 1)]
    hashes = {hash_of(tuple(values[-shift:] + values[:-shift])) for shift in range(len(values))}

    assert len(hashes) == len(FACTORS)


@pytest.mark.parametrize("theirs", ["", "b" * 64, "short", "1" * 500])
def test_any_text_can_be_compared(tmp_path: Path, theirs: str) -> None:
    assert differing(engine(tmp_path), theirs)


def test_what_is_too_little_to_be_named_is_still_a_difference(tmp_path: Path) -> None:
    ours = engine(tmp_path)

    assert differing(ours, "0" * 32 + ours[32:]) == "the model or its settings"


# ---- speculation ---------------------------------------------------------------------------------

OWN_LAYERS = set(get_args(MTPModelTypes)) | {
    *("eagle", "eagle3", "dflash", "dspark", "draft_model"),
    "extract_hidden_states",  # Kept in KV blocks.
    "custom_class",  # Nobody knows.
}


def _methods(kind: Any) -> set[str]:
    return {
        name
        for item in get_args(kind)
        for name in ({item} if isinstance(item, str) else _methods(item))
    }


def test_every_method_of_vllm_is_known_to_have_layers_or_none() -> None:
    # A new one counts as having layers; whether it has is to be looked up.
    assert _methods(SpeculativeMethod) == WITHOUT_KV | OWN_LAYERS


@pytest.mark.parametrize("method", sorted(WITHOUT_KV))
def test_speculation_without_layers_may_be_on_one_side(tmp_path: Path, method: str) -> None:
    assert engine(tmp_path, speculative=drafting(method, tmp_path)) == engine(tmp_path)


@pytest.mark.parametrize("method", sorted(OWN_LAYERS))
def test_speculation_with_layers_must_be_on_both(tmp_path: Path, method: str) -> None:
    one = engine(tmp_path, speculative=drafting(method))

    assert one == engine(tmp_path, speculative=drafting(method)) != engine(tmp_path)


def test_draft_models_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("a", "b", "c"):
        engine(tmp_path / name, weights=b"ac" if name in "ac" else b"bb")
    hashes = [engine(target, speculative=drafting("eagle", tmp_path / name)) for name in "abc"]

    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({}, None),
        ({"speculative_config": None}, None),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}, None),
        ({"speculative_config": {"model": "[ngram]"}}, None),
        ({"spec_method": "suffix", "spec_tokens": 4}, None),
        ({"speculative_config": {"method": "medusa", "model": "x"}}, None),
        ({"speculative_config": {"method": "mtp"}}, "mtp"),
        ({"speculative_config": {"method": "deepseek_mtp"}}, "mtp"),
        ({"speculative_config": {"method": "eagle", "model": "x"}}, "eagle of x"),
        ({"spec_method": "eagle", "spec_model": "x"}, "eagle of x"),
        ({"speculative_config": {"model": "x"}}, "x"),
    ],
)
def test_settings_tell_whether_there_are_layers(
    arguments: dict[str, Any], layers: str | None
) -> None:
    assert drafting_layers(arguments) == layers


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        ({}, False),
        ({"spec_method": "ngram"}, False),
        ({"spec_method": "suffix"}, True),
        ({"speculative_config": {"method": "suffix"}}, True),
        ({"speculative_config": {"model": "suffix"}}, True),
        ({"speculative_config": {"suffix_decoding_max_cached_requests": 9}}, False),
        (
            {"speculative_config": {"method": "suffix", "suffix_decoding_max_cached_requests": 9}},
            True,
        ),
        (
            {"speculative_config": {"method": "suffix", "suffix_decoding_max_cached_requests": 0}},
            False,
        ),
    ],
)
def test_settings_tell_whether_drafts_come_from_the_answers_of_others(
    arguments: dict[str, Any], shared: bool
) -> None:
    assert shares_answers(arguments) == shared
