"""What must agree for KV bytes to mean the same on both sides, as one hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONNECTOR_WIRE_VERSION = 1
_SAMPLE_BYTES = 1 << 20


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

    It does not cover what is compared or translated on its own: tensor parallelism, block sizes
    and the order of axes, which :mod:`transfer.connector.layout` describes.
    """
    from vllm import __version__ as vllm_version

    model = vllm_config.model_config
    hf_config: dict[str, Any] = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        hf_config.pop(name, None)
    speculative = vllm_config.speculative_config
    factors = {
        "wire": CONNECTOR_WIRE_VERSION,
        "vllm": vllm_version,
        "weights": weights_fingerprint(model.model, model.revision),
        "hf_config": hf_config,
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "layers": model.get_total_num_hidden_layers(),
        "kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "packing": packing,
        "attention_backend": attention_backend,
        "speculative": speculative.method if speculative is not None else None,
    }
    encoded = json.dumps(factors, sort_keys=True, default=str).encode()
    return hashlib.blake2b(encoded, digest_size=32, person=b"baton-layout-1").hexdigest()
