"""What kinds of speculation keep: KV blocks of their own beside the model's, clients' answers.

Apart from what asks vLLM, so that settings can be checked without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

WITHOUT_KV: Final = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})
"""They look at tokens, or at the last hidden state. All others have layers with a KV cache."""


def drafting_layers(engine: Mapping[str, Any]) -> str | None:
    """What keeps KV of its own under these engine arguments of vLLM; None if nothing does.

    Two sides whose blocks mean the same have it alike. A draft model whose ``method`` vLLM is left
    to find out counts as one.
    """
    method, model = _method_and_model(engine)
    if method is None or method in WITHOUT_KV:
        return None
    if method.endswith("mtp"):
        method = "mtp"  # Whatever the model is called in it.
    return method if model in (None, method) else f"{method} of {model}"


def shares_answers(engine: Mapping[str, Any]) -> bool:
    """Whether one request's answer makes it into what is drafted for others."""
    kept = _config(engine).get("suffix_decoding_max_cached_requests")
    return _method_and_model(engine)[0] == "suffix" and kept != 0


def _method_and_model(engine: Mapping[str, Any]) -> tuple[str | None, Any]:
    config = _config(engine)
    model = engine.get("spec_model") or config.get("model")
    method = engine.get("spec_method") or config.get("method") or model
    return (str(method).strip("[]") if method is not None else None), model


def _config(engine: Mapping[str, Any]) -> Mapping[str, Any]:
    config = engine.get("speculative_config")
    return config if isinstance(config, Mapping) else {}
