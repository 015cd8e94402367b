"""Which way a request goes: through a prefill replica, or straight to decode. Pure."""

from __future__ import annotations

from typing import Any, Final

from deployments.router.admission import PromptSize

_ALL: Final = 1 << 17
"""Log-probabilities of each token where all of the vocabulary is asked for, which is -1."""


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


def prompt_logprobs(body: Any) -> tuple[str, int]:
    """How many log-probabilities of its prompts a request asks for, and in which field.

    For each token the token's own and those of the best; with characters where the tokens of a
    text are not known. 0 if it asks for none.

    Args:
        body: of chat or completions, as Ray's models read it.
    """
    field = "prompt_logprobs"
    if (best := body.prompt_logprobs) is None and body.echo:
        field = "top_logprobs" if hasattr(body, "messages") else "logprobs"
        best = getattr(body, field)
    if best is None:
        return field, 0
    size = PromptSize.of(body)
    each = (_ALL if best < 0 else best) + 1
    return field, (size.characters + size.tokens) * (body.n or 1) * each
