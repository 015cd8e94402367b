"""Which models' KV caches can be handed over, told by their config.json before anything starts.

Reads it as Transformers does, which knows each kind's defaults, and asks nothing of vLLM, whose
import alone takes longer than the whole check. The connector looks again at what vLLM made of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from serve_app.config import Settings
from serve_app.launch.demo_model import resolve_model

_OTHER_LAYERS: Final = frozenset(
    {
        # They keep a state that changes with each token, alone or beside keys and values.
        *("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"),
        # Beside keys and values, or instead, they cache what finds the tokens to look at.
        *("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    }
)
"""Types of layers, of those that a config lists, that do not cache keys and values alone."""

_SIGNS_OF_STATES: Final = (
    # Of models whose config does not list its layers' types.
    *("mamba_d_state", "mamba_d_ssm", "mamba_num_heads", "ssm_cfg", "ssm_state_size", "state_size"),
    *("hybrid_override_pattern", "attn_layer_indices", "attn_layer_period", "attn_type_list"),
    *("linear_attn_config", "linear_num_value_heads", "layer_group_size", "rwkv_head_size"),
)
_LATENT_AS_HEADS: Final = frozenset({"minicpm3"})
"""Have latents, which vLLM expands into heads before it caches them."""


def model_fault(settings: Settings) -> str | None:
    """Why Baton cannot hand over prompts of the settings' model, and what could be done.

    None if it can, or if its config.json is not on this machine or not what vLLM goes by.

    Raises:
        ModelError: the demo model is asked for and has not been made yet.
    """
    engines = [{**settings.engine, **settings.side(role).engine} for role in ("prefill", "decode")]
    if any(engine.get("hf_overrides") or engine.get("hf_config_path") for engine in engines):
        return None
    source = settings.model.source
    try:
        folder = config_folder(resolve_model(source), engines[0].get("revision"))
    except ValueError:
        return None  # A folder of another machine.
    if folder is None:
        return None
    try:
        kind = not_handed_over(folder, windows=not _all_without_window(engines))
    except ValueError as error:
        return f"{source}: {error}"
    if kind is None or (kind == MLA and _is_mla_off(settings)):
        return None
    other = "take a model of which every layer has attention over keys and values of its own"
    if kind == WINDOWS:
        other += ", or set engine.disable_sliding_window, with prompts no longer than the window"
    return (
        f"{source} has {kind}, and such prompts cannot be handed over: {other} (docs/transfer.md)"
    )


def config_folder(source: str, revision: str | None = None) -> Path | None:
    """The folder of a model's config.json, if that is on this machine. Asks no other.

    Args:
        source: a folder or a Hugging Face id, which is looked for in the local cache.

    Raises:
        ValueError: it can be neither.
    """
    if (Path(source) / "config.json").is_file():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError as error:
        raise ValueError(f"{source} is neither a folder nor a Hugging Face id: {error}") from error
    return Path(cached).parent if isinstance(cached, str) else None


MLA: Final = "multi-head latent attention (MLA)"
WINDOWS: Final = "a sliding window in every layer"


def not_handed_over(folder: Path, *, windows: bool = True) -> str | None:
    """What the model in ``folder`` has that cannot be handed over; None if there is nothing.

    Args:
        folder: has a config.json.
        windows: whether tokens that a sliding window has left behind are forgotten.

    Raises:
        ValueError: config.json is not such a file.
    """
    text, is_complete = _text_config(folder)
    if _is_set(text, "is_encoder_decoder"):
        return "an encoder beside its decoder"
    if _has_latents(text):
        return MLA
    layers = _layer_types(text)
    if others := sorted(_OTHER_LAYERS.intersection(layers)):
        return f"layers of another kind ({', '.join(others)}), as Mamba and other hybrids"
    if not layers and any(_is_set(text, name) for name in _SIGNS_OF_STATES):
        return "layers of another kind, as Mamba and other hybrids"
    # A config that lists no types may have a window that its kind never uses.
    window = bool(layers) or (is_complete and _is_set(text, "sliding_window"))
    return WINDOWS if windows and window and set(layers) <= {"sliding_attention"} else None


def _all_without_window(engines: list[dict[str, Any]]) -> bool:
    return all(engine.get("disable_sliding_window") for engine in engines)


def _is_mla_off(settings: Settings) -> bool:
    """Whether vLLM is told to cache keys and values instead of latents."""
    name = "VLLM_MLA_DISABLE"
    sides = (settings.prefill, settings.decode)
    return all(side.env.get(name, os.environ.get(name, "0")).strip() != "0" for side in sides)


def _text_config(folder: Path) -> tuple[Any, bool]:
    """What the config says of the language model, and whether defaults are filled in."""
    raw = _raw_config(folder)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config(), True
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError):
        # A kind that only vLLM knows, or that comes with code of its own, or a mistake in the
        # file, which vLLM will tell.
        return SimpleNamespace(**_inner(raw)), False


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config.json is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"config.json cannot be read: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise ValueError("config.json is not a JSON object")
    return raw


def _inner(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of the language model, also of a model that has other parts beside it."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(inner := raw.get(name), dict):
            return {**raw, **inner}
    return raw


def _has_latents(text: Any) -> bool:
    names = ("kv_lora_rank", "compress_ratios")
    return getattr(text, "model_type", "") not in _LATENT_AS_HEADS and any(
        _is_set(text, name) for name in names
    )


def _layer_types(text: Any) -> list[str]:
    for name in ("layer_types", "layers_block_type"):
        if isinstance(types := getattr(text, name, None), list | tuple) and types:
            return [str(kind) for kind in types]
    return []


def _is_set(text: Any, name: str) -> bool:
    try:
        return bool(getattr(text, name, None))
    except RuntimeError:  # Transformers' way to say that it differs from layer to layer
        return True
