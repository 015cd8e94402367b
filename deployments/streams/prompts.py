"""One request for each prompt of a request. Pure."""

from __future__ import annotations

from typing import Any

from deployments.streams.generation import GenerationRequest


def split(request: GenerationRequest) -> list[GenerationRequest]:
    """A request for each prompt, in order; the request itself if it has no more than one.

    Prompts are several texts or several lists of token ids. A mixture is nothing that an engine
    knows: it stays as it is, to be refused there.
    """
    prompt = getattr(request.body, "prompt", None)
    if request.method == "chat" or not isinstance(prompt, list) or len(prompt) < 2:
        return [request]
    if not (_all(prompt, str) or (_all(prompt, list) and all(_all(ids, int) for ids in prompt))):
        return [request]
    return [request.with_prompt(one) for one in prompt]


def prompts_in(prompt: Any) -> int:
    """How many prompts are in a request's ``prompt``: only a list of texts or of lists has more."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def samples_of(n: Any) -> int:
    """How many answers each prompt gets, by the request's ``n`` as vLLM reads it."""
    return n if type(n) is int and n > 0 else 1


def _all(items: list[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)
