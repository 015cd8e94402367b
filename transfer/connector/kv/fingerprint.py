"""What must agree for KV bytes to mean the same on both sides, as one hash that can name a part."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transfer.speculation import WITHOUT_KV

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

CONNECTOR_WIRE_VERSION = 2
_SAMPLE_BYTES = 1 << 20

FACTORS: Final = (
    "version of vLLM or Baton",
    "weights of the model",
    "config.json of the model, or what overrides it",
    "quantization",
    "dtype",
    "kv_cache_dtype",
    "attention backend",
    "speculation with layers of its own",
)
"""In the order in which a layout hash names them."""

_WHOLE_BYTES = 16
_NAMING_BYTES = 2


def weights_fingerprint(model: str, revision: str | None) -> str:
    """Names the weights, independent of where they lie on disk.

    A folder is named by its weight files: name, size, and a sample from both ends of each (two
    fine-tunes of one model differ nowhere else). Anything else, a hub id, by id and revision.
    """
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(model)
    if not folder.is_dir():
        digest.update(f"{model}@{revision or 'main'}".encode())
        return digest.hexdigest()
    files = sorted(
        path
        for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pt")
        for path in folder.glob(pattern)
    )
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def layout_hash(vllm_config: VllmConfig, *, packing: str, attention_backend: str) -> str:
    """64 hex digits; equal on two workers exactly if the same prompt means the same KV to both.

    32 digits are a hash of everything; then come 4 for each of :data:`FACTORS`, for
    :func:`differing`. What is compared or translated on its own is not in it: tensor parallelism,
    block sizes and the order of axes, which :mod:`transfer.connector.kv.layout` describes. Nor is
    what changes no KV of a prompt, like speculation that has no layers of its own.
    """
    from vllm import __version__ as vllm_version

    model = vllm_config.model_config
    hf_config: dict[str, Any] = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        hf_config.pop(name, None)
    shape = (
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
    )
    return hash_of(
        (
            (CONNECTOR_WIRE_VERSION, vllm_version),
            weights_fingerprint(model.model, model.revision),
            (hf_config, shape),
            str(model.quantization),
            str(model.dtype),
            str(vllm_config.cache_config.cache_dtype),
            (packing, attention_backend),
            _drafting(vllm_config.speculative_config),
        )
    )


def hash_of(values: tuple[Any, ...]) -> str:
    """The layout hash of these values of :data:`FACTORS`; each must be known to JSON, or to str.

    Raises:
        ValueError: there is not one for each factor.
    """
    parts = [_hash(factor, value) for factor, value in zip(FACTORS, values, strict=True)]
    whole = hashlib.blake2b(b"".join(parts), digest_size=_WHOLE_BYTES, person=b"baton-layout-2")
    return whole.hexdigest() + "".join(part[:_NAMING_BYTES].hex() for part in parts)


def differing(ours: str, theirs: str) -> str:
    """Names the factors in which two unequal layout hashes differ, for people."""
    names = []
    for number, factor in enumerate(FACTORS):
        digits = slice(
            2 * (_WHOLE_BYTES + number * _NAMING_BYTES),
            2 * (_WHOLE_BYTES + (number + 1) * _NAMING_BYTES),
        )
        if ours[digits] != theirs[digits]:
            names.append(factor)
    # One difference in 65,536 cannot be told from equality by so few digits.
    return "; ".join(names) or "the model or its settings"


def _hash(factor: str, value: Any) -> bytes:
    encoded = json.dumps([factor, value], sort_keys=True, default=str).encode()
    return hashlib.blake2b(encoded, digest_size=_WHOLE_BYTES).digest()


def _drafting(speculative: SpeculativeConfig | None) -> Any:
    if speculative is None or speculative.method in WITHOUT_KV:
        return None
    draft = speculative.draft_model_config
    weights = None if draft is None else weights_fingerprint(draft.model, draft.revision)
    return speculative.method, weights
