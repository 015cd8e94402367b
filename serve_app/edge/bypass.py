"""Which requests go straight to decode, and not through a prefill replica. Pure."""

from __future__ import annotations

from typing import Any


def bypass_reason(request: Any) -> str | None:
    """Why a request cannot use KV from elsewhere, or None if it can.

    Log-probabilities of the prompt come out of computing the prompt, which is just what a hand-off
    saves decode from; beam search asks the engine for many prompts of its own making; embeddings
    have no token ids that a ticket could be checked against. Decode serves these whole.
    """
    if getattr(request, "prompt_logprobs", None) is not None:
        return "prompt_logprobs"
    if getattr(request, "echo", False):
        # The engine is then asked for those of the prompt, in chats as many as `top_logprobs`
        # says, which is 0 of itself: the prompt's own tokens.
        if getattr(request, "logprobs", None) is not None:
            return "echo with logprobs"
        if hasattr(request, "messages") and getattr(request, "top_logprobs", 0) is not None:
            return "echo of a chat"
    if getattr(request, "use_beam_search", False):
        return "use_beam_search"
    if getattr(request, "prompt_embeds", None) is not None:
        return "prompt_embeds"
    return None
