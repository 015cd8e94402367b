"""Requests and answers of vLLM's OpenAI servers, as JSON over HTTP. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deployments.generation import Method
from deployments.prompts import samples_of

PATHS: dict[Method, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

_ONLY_FOR_DECODE = frozenset(
    # They say how tokens are chosen or told, which concerns decode, and some would contradict the
    # clamp to one token. What the prompt is rendered from stays, tools among it.
    {
        *("stream_options", "n", "best_of", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
        *("logprobs", "top_logprobs", "echo", "response_format", "structured_outputs"),
        *("return_token_ids", "return_tokens_as_token_ids"),
    }
)


@dataclass(frozen=True)
class JsonBody:
    """A request's JSON object, its fields as attributes, as with the models that Ray parses.

    Attributes:
        fields: the object.
        headers: of the HTTP request, to be sent with it.
    """

    fields: Mapping[str, Any]
    headers: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None

    def model_copy(self, *, update: Mapping[str, Any]) -> JsonBody:
        """With other values of some fields; those that are None are left out."""
        fields = {key: value for key, value in self.fields.items() if key not in update}
        given = {key: value for key, value in update.items() if value is not None}
        return replace(self, fields={**fields, **given})


def prefill_body(method: Method, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a prefill server is asked for a request of one prompt: one token."""
    kept = {key: value for key, value in fields.items() if key not in _ONLY_FOR_DECODE}
    kept |= {
        "stream": False,
        "max_tokens": 1,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "readers": samples_of(fields.get("n")),
        },
    }
    if method == "chat":
        kept["max_completion_tokens"] = 1
    return kept


def answers(fields: Mapping[str, Any]) -> int:
    """How many choices the answer to a request has, whatever its number of prompts."""
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = len(prompt) if several and isinstance(prompt, list) else 1
    return prompts * samples_of(fields.get("n"))
