"""Which models are refused by their config.json, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.app import build_app
from serve_app.config import Settings, SettingsError, parse_settings
from serve_app.launch.model_kind import MLA, WINDOWS, model_fault, not_handed_over
from serve_app.launch.surroundings import check_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
CODE = {"auto_map": {"AutoConfig": "configuration_its_own.ItsOwnConfig"}}
"""Of models that bring code along, which nobody runs here."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "Granite 4": {
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "mamba", "mamba", "attention"],
    },
    "Qwen3-Next, which lists no types": {"model_type": "qwen3_next", "full_attention_interval": 4},
    "Qwen 3.5, with images": {
        "model_type": "qwen3_5",
        "text_config": {"model_type": "qwen3_5_text", "full_attention_interval": 4, **SIZES},
        "vision_config": {"model_type": "qwen3_5", "depth": 2},
    },
    "Nemotron-H": {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"},
    "Jamba": {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 3},
    "Falcon-H1": {"model_type": "falcon_h1", "mamba_d_ssm": 64},
    "Zamba 2": {"model_type": "zamba2", "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]},
    "Mamba 2": {"model_type": "mamba2", "state_size": 128},
    "LFM 2": {"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "MiniMax-Text": {"model_type": "minimax_text_01", "attn_type_list": [0, 0, 0, 1], **CODE},
    "Plamo 2": {"model_type": "plamo2", "mamba_d_state": 64, "mamba_step": 2, **CODE},
}
LATENT: dict[str, dict[str, Any]] = {
    "DeepSeek V3": DEEPSEEK,
    "Kimi K2": {**DEEPSEEK, "model_type": "kimi_k2", **CODE},
    "GLM 4.7 Flash": {"model_type": "glm4_moe_lite", "kv_lora_rank": 512},
    "Kimi VL": {"model_type": "kimi_vl", "text_config": {**DEEPSEEK, **SIZES}, **CODE},
}
HANDED_OVER: dict[str, dict[str, Any]] = {
    "Llama": {"model_type": "llama"},
    "Qwen 2.5, whose window is off": {
        "model_type": "qwen2",
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "Qwen 3": {"model_type": "qwen3"},
    "Mistral of today": {"model_type": "mistral", "sliding_window": None},
    "Gemma 3, windows and full attention": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 6},
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2},
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 128,
    },
    "Granite 4 micro, all attention": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 4,
    },
    "MiniCPM 3, whose latents vLLM expands": {
        "model_type": "minicpm3",
        "kv_lora_rank": 256,
        **CODE,
    },
    "a kind that nobody here knows": {"model_type": "of_tomorrow", "sliding_window": 4096, **CODE},
}


def write(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    sizes = SIZES if isinstance(config, dict) and "text_config" not in config else {}
    (folder / "config.json").write_text(
        json.dumps({**sizes, **config} if isinstance(config, dict) else config)
    )
    return folder


def settings(model: str | Path, **changes: Any) -> Settings:
    return parse_settings(arguments(model, **changes))


def arguments(model: str | Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"id": "m", "source": str(model)},
        "discovery": {"kind": "static", "peers": []},
        **changes,
    }


@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
def test_hybrids_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    refused = not_handed_over(write(tmp_path, config))
    assert refused is not None
    assert refused.startswith("layers of another kind")
    assert refused.endswith(", as Mamba and other hybrids")


@pytest.mark.parametrize("config", LATENT.values(), ids=LATENT)
def test_latent_attention_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    assert not_handed_over(write(tmp_path, config)) == MLA


def test_encoders_are_refused(tmp_path: Path) -> None:
    whisper = {"model_type": "whisper", "encoder_layers": 2, "decoder_layers": 2}
    assert not_handed_over(write(tmp_path, whisper)) == "an encoder beside its decoder"


@pytest.mark.parametrize("config", HANDED_OVER.values(), ids=HANDED_OVER)
def test_others_are_not(tmp_path: Path, config: dict[str, Any]) -> None:
    assert not_handed_over(write(tmp_path, config)) is None


def test_a_window_in_every_layer_is_refused_unless_it_is_switched_off(tmp_path: Path) -> None:
    model = write(tmp_path, {"model_type": "mistral", "sliding_window": 4096})

    assert not_handed_over(model) == WINDOWS
    fault = model_fault(settings(model))
    assert fault is not None
    assert "or set engine.disable_sliding_window" in fault
    assert model_fault(settings(model, engine={"disable_sliding_window": True})) is None


def test_the_refusal_names_the_model_and_what_would_be_right(tmp_path: Path) -> None:
    model = write(tmp_path, DEEPSEEK)
    assert model_fault(settings(model)) == (
        f"{model} has multi-head latent attention (MLA), and such prompts cannot be handed over: "
        "take a model of which every layer has attention over keys and values of its own "
        "(docs/transfer.md)"
    )


def test_latent_attention_may_be_switched_off_on_both_sides(tmp_path: Path) -> None:
    model = write(tmp_path, DEEPSEEK)
    off = {"env": {"VLLM_MLA_DISABLE": "1"}}

    assert model_fault(settings(model, prefill=off, decode=off)) is None
    assert model_fault(settings(model, prefill=off)) is not None


def test_a_config_from_elsewhere_is_not_judged_by_the_one_here(tmp_path: Path) -> None:
    model = write(tmp_path, DEEPSEEK)
    assert model_fault(settings(model, engine={"hf_overrides": {"kv_lora_rank": None}})) is None


@pytest.mark.parametrize("model", ["nobody/nothing", "/not/here", "not a name at all"])
def test_a_model_that_is_not_here_is_not_judged(model: str) -> None:
    assert model_fault(settings(model)) is None


def test_a_model_in_the_cache_of_hugging_face_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--big--deep"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    write(folder / "snapshots" / "abc", DEEPSEEK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    fault = model_fault(settings("big/deep"))

    assert fault is not None
    assert fault.startswith("big/deep has multi-head latent attention")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": ' + b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'"llama"', "is not a JSON object"),
    ],
)
def test_what_is_no_config_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    fault = model_fault(settings(tmp_path))
    assert fault is not None
    assert fault.startswith(f"{tmp_path}: config.json {said}")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 5},
        {"model_type": None, "text_config": [1]},
        {"model_type": "llama", "rope_scaling": 5},
        {"model_type": "llama", "num_attention_heads": "many"},
        {"model_type": "llama", "layer_types": {"a": 1}},
        {"model_type": "qwen3", "num_hidden_layers": -1, "layer_types": 7},
        {"model_type": "gemma3", "text_config": "none"},
        {"model_type": "llama", "self": 1, "__class__": 2},
    ],
)
def test_mistakes_in_a_config_are_left_to_vllm(tmp_path: Path, config: dict[str, Any]) -> None:
    assert not_handed_over(write(tmp_path, config)) is None


def test_check_and_serve_run_refuse_it_before_anything_starts(tmp_path: Path) -> None:
    model = write(tmp_path, HYBRIDS["Granite 4"])
    fault = f"{model} has layers of another kind (linear_attention), as Mamba and other hybrids"

    finding = check_model(settings(model))
    assert (finding.level, finding.text.startswith(f"model: {fault}")) == ("error", True)
    with pytest.raises(SettingsError) as caught:
        build_app(arguments(model))
    assert str(caught.value).startswith(f"model.source: {fault}")
