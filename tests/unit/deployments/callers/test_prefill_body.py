"""What a prefill server is asked, field by field of vLLM's own request models."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from deployments.callers.prefill_body import (
    LEFT_OUT,
    REPLACED,
    UNCHANGED,
    not_clamped,
    prefill_body,
)
from deployments.streams.generation import Method

MODELS: dict[Method, Any] = {"completions": CompletionRequest, "chat": ChatCompletionRequest}
MODEL_CONFIG: Any = SimpleNamespace(max_model_len=1024)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# Each field of either model with a value that is not its default.
VALUES: dict[str, Any] = {
    "model": "m",
    "prompt": "Once",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1.0},
    "logprobs": 1,
    "top_logprobs": 2,
    "logprob_token_ids": [50, 60],
    "max_tokens": 200,
    "max_completion_tokens": 300,
    "n": 2,
    "presence_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "seed": 5,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "suffix": "end",
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "u",
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "reasoning_effort": "low",
    "thinking_token_budget": 7,
    "include_reasoning": False,
    "parallel_tool_calls": False,
    "use_beam_search": True,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "length_penalty": 2.0,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "min_tokens": 9,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 100,
    "truncation_side": "left",
    "allowed_token_ids": [1, 2],
    "prompt_logprobs": 0,
    "bad_words": ["x"],
    "prompt_embeds": b"x",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "documents": [{"title": "t", "text": "x"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"a": 1},
    "media_io_kwargs": {"image": {"a": 1}},
    "mm_processor_kwargs": {"a": 1},
    "structured_outputs": {"regex": "a"},
    "priority": 3,
    "request_id": "r",
    "session_id": "s",
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "routed_experts_prompt_start": 4,
    "return_token_offsets": True,
    "return_prompt_text": True,
    "return_assistant_tokens_mask": True,
    "cache_salt": "salt",
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "repetition_detection": {"max_pattern_size": 5, "min_count": 3},
    "stream_interval": 2,
}


def fields_of(method: Method) -> dict[str, Any]:
    """A valid request with nearly all of its fields."""
    # With these, others are refused; requests with two of them never go through prefill.
    alone = {"structured_outputs", "use_beam_search", "prompt_embeds"}
    return {name: VALUES[name] for name in MODELS[method].model_fields if name not in alone}


def test_every_field_of_the_api_has_one_place() -> None:
    """A field that this finds is new in vLLM: what does it do to a prompt, and to one token?"""
    known = {name for model in MODELS.values() for name in model.model_fields}
    places = [*UNCHANGED, *LEFT_OUT, *REPLACED]

    assert known == set(places)
    assert len(places) == len(set(places))
    assert set(VALUES) == known


@pytest.mark.parametrize("method", MODELS)
def test_each_is_treated_as_said(method: Method) -> None:
    fields = {name: value for name, value in VALUES.items() if name in MODELS[method].model_fields}
    body = prefill_body(method, fields)

    for name, value in fields.items():
        if name in UNCHANGED:
            assert body[name] == value, name
        elif name in LEFT_OUT:
            assert name not in body
    asked = {"do_remote_decode": True, "do_remote_prefill": False, "readers": 2}
    chat = {"max_completion_tokens": 1} if method == "chat" else {}
    expected = {"stream": False, "max_tokens": 1, "kv_transfer_params": asked, **chat}
    assert {name: body[name] for name in REPLACED if name in body} == expected


@pytest.mark.parametrize("method", MODELS)
def test_prefill_renders_the_prompt_that_decode_renders(method: Method) -> None:
    """With every field set that vLLM makes a prompt from; what differs is named here."""
    fields = fields_of(method)
    body = prefill_body(method, fields)
    client, prefill = (MODELS[method](**given) for given in (fields, body))

    theirs, ours = (request.build_tok_params(MODEL_CONFIG) for request in (client, prefill))
    differ = {
        field.name
        for field in dataclasses.fields(theirs)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    }
    # The number of tokens to make moves the end of a prompt only where nothing else does, see
    # not_clamped; the text of a prompt that is echoed is kept besides its tokens.
    assert differ <= {"max_output_tokens", "needs_detokenization"}
    if method == "chat":
        theirs, ours = (request.build_chat_params(None, "auto") for request in (client, prefill))
        assert theirs == ours


@pytest.mark.parametrize("method", MODELS)
@pytest.mark.parametrize(
    "given",
    [
        {"logprobs": 1, "logprob_token_ids": [50, 60]},
        {"logprobs": 1, "top_logprobs": 2, "echo": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"min_tokens": 30, "max_tokens": 40},
        {"n": 3, "best_of": 3},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_vllm_takes_what_is_asked_of_prefill(method: Method, given: dict[str, Any]) -> None:
    prompt = {"prompt": "Hi"} if method == "completions" else {"messages": VALUES["messages"]}
    MODELS[method](**prompt, **given)  # as the client may
    body = prefill_body(method, {**prompt, **given})

    params = MODELS[method](**body).to_sampling_params(1, {})

    assert (params.max_tokens, params.n, params.logprobs, params.prompt_logprobs) == (
        *(1, 1),
        *(None, None),
    )


@pytest.mark.parametrize(
    ("given", "clamped"),
    [({}, True), ({"truncate_prompt_tokens": 20}, True), ({"truncate_prompt_tokens": -1}, False)],
)
def test_a_prompt_cut_by_the_room_that_the_answer_leaves_is_not_clamped(
    given: dict[str, Any], clamped: bool
) -> None:
    assert (not_clamped({"prompt": "x", **given}) is None) is clamped


@pytest.mark.parametrize(
    ("n", "readers"), [(None, 1), (3, 3), (0, 1), (-1, 1), ("3", 1), (True, 1)]
)
def test_every_sample_reads_the_ticket(n: Any, readers: int) -> None:
    body = prefill_body("completions", {"prompt": "x", "n": n})

    assert body["kv_transfer_params"]["readers"] == readers
    assert "n" not in body


def test_what_the_prompt_is_rendered_from_stays() -> None:
    kept = {"model": "m", "messages": [], "tools": [{}], "chat_template_kwargs": {}, "user": "u"}
    body = prefill_body("chat", {**kept, "stream": True, "min_tokens": 9, "logprobs": True})

    assert {name: body[name] for name in kept} == kept
    assert not body["stream"]
    assert not {"min_tokens", "logprobs"} & set(body)


@pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": []}, {"prompt": {"a": 1}}])
def test_prompts_that_make_no_sense_are_left_to_the_engine(fields: dict[str, Any]) -> None:
    body = prefill_body("completions", fields)

    assert body.get("prompt") == fields.get("prompt")
