"""What a prefill server is asked for a client's request: its prompt, and one token. Pure.

Both servers render the prompt, each from what it is sent, so a request for prefill is the client's
own but for what contradicts the clamp to one token. Each field of the API has its place here;
fields that the API does not know go through unchanged. What prefill refuses all the same, decode
decides on, which sees the request as it came
(:class:`~deployments.callers.http_caller.HttpCaller`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deployments.streams.generation import Method
from deployments.streams.prompts import samples_of
from transfer.ticket import ticket_request

UNCHANGED: Final = frozenset(
    {
        # The prompt is rendered from them, tools and response_format among it.
        *("prompt", "messages", "tools", "tool_choice", "response_format", "documents"),
        "reasoning_effort",
        *("chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens", "suffix"),
        *("truncate_prompt_tokens", "truncation_side", "return_assistant_tokens_mask"),
        # Which blocks these are, and when they are computed.
        *("model", "cache_salt", "priority", "request_id", "session_id", "user"),
        # How tokens are chosen. Nobody reads the one that prefill makes, and they are checked
        # alike for any number of tokens.
        *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "allowed_token_ids"),
        *("bad_words", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("length_penalty", "repetition_detection", "thinking_token_budget", "vllm_xargs"),
        # How an answer is told, at no cost for one token.
        *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
        *("stream_interval", "include_reasoning", "parallel_tool_calls", "return_token_offsets"),
        *("return_prompt_text", "routed_experts_prompt_start"),
        # With a value that matters, the request does not go through prefill at all.
        *("prompt_logprobs", "prompt_embeds", "use_beam_search"),
    }
)
"""Fields that go through prefill as they are."""

LEFT_OUT: Final[Mapping[str, str]] = {
    "n": "the prompt is computed once; `readers` says how often it is read",
    "stream_options": "refused without `stream`",
    "min_tokens": "refused where it exceeds `max_tokens`",
    "stop": "ends an answer that nobody reads",
    "stop_token_ids": "ends an answer that nobody reads",
    "ignore_eos": "ends an answer that nobody reads, or not",
    "echo": "tells the prompt in an answer that nobody reads, in chats with its log-probabilities",
    "logprobs": "would be computed for a token that nobody reads, up to those of all tokens",
    "top_logprobs": "refused without `logprobs`",
    "logprob_token_ids": "refused without `logprobs`",
    "structured_outputs": "a grammar would be compiled for a token that nobody reads",
    "return_token_ids": "tells the prompt in an answer that nobody reads",
    "return_tokens_as_token_ids": "tells tokens in an answer that nobody reads",
}
"""Fields that prefill is not told, and why. No prompt is rendered from them."""

REPLACED: Final[Mapping[str, str]] = {
    "stream": "the ticket comes with a whole answer",
    "max_tokens": "1: the least that vLLM takes",
    "max_completion_tokens": "1, in chats, where it comes before `max_tokens`",
    "kv_transfer_params": "asks for the ticket; from a client it is refused",
    "ec_transfer_params": "from a client it is refused; nothing here sets it",
}
"""Fields that have another value for prefill, or none, whatever the client says; and why."""


def not_clamped(fields: Mapping[str, Any]) -> str | None:
    """Why a request cannot be clamped to one token, or None if it can.

    ``truncate_prompt_tokens: -1`` keeps as many tokens of the prompt as the answer leaves room for:
    with one token to make, prefill would compute another prompt.
    """
    if fields.get("truncate_prompt_tokens") == -1:
        return "truncate_prompt_tokens -1"
    return None


def prefill_body(method: Method, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a prefill server is asked for a request of one prompt: one token."""
    kept = {
        name: value
        for name, value in fields.items()
        if name not in LEFT_OUT and name not in REPLACED
    }
    kept |= {
        "stream": False,
        "max_tokens": 1,
        "kv_transfer_params": ticket_request(samples_of(fields.get("n"))),
    }
    if method == "chat":
        kept["max_completion_tokens"] = 1
    return kept
