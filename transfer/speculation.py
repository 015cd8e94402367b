"""Which kinds of speculation keep KV blocks of their own beside the model's.

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
    config = engine.get("speculative_config")
    config = config if isinstance(config, Mapping) else {}
    model = engine.get("spec_model") or config.get("model")
    method = engine.get("spec_method") or config.get("method") or model
    method = str(method).strip("[]") if method is not None else None
    if method is None or method in WITHOUT_KV:
        return None
    if method.endswith("mtp"):
        method = "mtp"  # Whatever the model is called in it.
    return method if model in (None, method) else f"{method} of {model}"
