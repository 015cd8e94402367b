"""How many log-probabilities of its prompts a request asks for."""

from __future__ import annotations

from typing import Final

from deployments.ray_internals.models import ChatCompletionRequest, CompletionRequest
from deployments.router.admission import PromptSize

_ALL: Final = 1 << 17
"""Log-probabilities of each token where all of the vocabulary is asked for, which is -1."""


def prompt_logprobs(body: ChatCompletionRequest | CompletionRequest) -> tuple[str, int]:
    """How many log-probabilities of its prompts a request asks for, and in which field.

    For each token the token's own and those of the best; with characters where the tokens of a
    text are not known. 0 if it asks for none.
    """
    field = "prompt_logprobs"
    if (best := body.prompt_logprobs) is None and body.echo:
        field = "top_logprobs" if isinstance(body, ChatCompletionRequest) else "logprobs"
        best = getattr(body, field)
    if best is None:
        return field, 0
    size = PromptSize.of(body)
    each = (_ALL if best < 0 else best) + 1
    return field, (size.characters + size.tokens) * (body.n or 1) * each
