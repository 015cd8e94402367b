from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from deployments.errors import ContinuationMismatch
from deployments.streams.continuation import StreamParts, may_go_on
from deployments.streams.generation import Method, Output, Sent, Transcript

DONE = "data: [DONE]\n\n"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}

# ---- which streams may go on ---------------------------------------------------------------------

FINE: dict[str, dict[str, Any]] = {
    "as they are": {},
    "greedy, with a seed": {"temperature": 0, "seed": 3},
    "sampled without a seed": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "stop": {"stop": ["a", "b"], "include_stop_str_in_output": True},
    "budgets": {"max_tokens": 5, "min_tokens": 2, "ignore_eos": True},
    "usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "penalty that looks at the prompt too": {"repetition_penalty": 1.1},
    "n of one": {"n": 1},
    "penalties of 0": {"presence_penalty": 0, "frequency_penalty": 0.0},
    "plain format": {"response_format": {"type": "text"}},
    "unknown to vLLM": {"metadata": {"a": "b"}},
}
NOT: dict[str, dict[str, Any]] = {
    "not streamed": {"stream": False},
    "sampled with a seed": {"temperature": 0.8, "seed": 3},
    "seed and the model's own temperature": {"seed": 3},
    "n": {"n": 2},
    "echo": {"echo": True},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "bad_words": {"bad_words": ["no"]},
    "JSON": {"response_format": {"type": "json_object"}},
    "schema": {"response_format": SCHEMA},
    "regex": {"structured_outputs": {"regex": "a+"}},
    "token ids": {"return_token_ids": True},
    "arguments of a plugin": {"vllm_xargs": {"a": 1}},
}


@pytest.mark.parametrize("more", FINE.values(), ids=FINE.keys())
@pytest.mark.parametrize("chat", [False, True])
def test_streams_that_may_go_on(chat: bool, more: dict[str, Any]) -> None:
    assert may_go_on(body(chat, more))


@pytest.mark.parametrize("more", NOT.values(), ids=NOT.keys())
@pytest.mark.parametrize("chat", [False, True])
def test_streams_that_may_not(chat: bool, more: dict[str, Any]) -> None:
    assert not may_go_on(body(chat, more))


@pytest.mark.parametrize(
    ("chat", "more", "fine"),
    [
        (False, {"logprobs": 0}, False),
        (True, {"logprobs": True, "top_logprobs": 1}, False),
        (True, {"tools": [TOOL]}, False),
        (True, {"tools": [TOOL], "tool_choice": "none"}, False),
        (False, {"prompt": [1, 2, 3]}, True),
        (False, {"prompt": ["a", "b"]}, True),
        (False, {"prompt": ["a"]}, True),
        (False, {"prompt": [[1, 2]]}, True),
        (True, {"max_completion_tokens": 9, "user": "u"}, True),
        (True, {"continue_final_message": True, "add_generation_prompt": False}, True),
    ],
)
def test_fields_of_one_of_the_two(chat: bool, more: dict[str, Any], fine: bool) -> None:
    assert may_go_on(body(chat, more)) is fine


def body(chat: bool, more: dict[str, Any]) -> Any:
    base: dict[str, Any] = {"model": "m", "stream": True}
    if chat:
        messages = [{"role": "user", "content": "hi"}]
        return ChatCompletionRequest(**{**base, "messages": messages, **more})
    return CompletionRequest(**{**base, "prompt": "Once", **more})


# ---- events --------------------------------------------------------------------------------------


def event(
    method: Method,
    text: str | None,
    token_ids: list[int] | None,
    *,
    created: int = 100,
    finish: str | None = None,
    **delta: Any,
) -> str:
    choice: dict[str, Any] = {"index": 0}
    if method == "chat":
        choice["delta"] = {**({} if text is None else {"content": text}), **delta}
        choice["finish_reason"] = finish
    else:
        choice |= {"text": text, "finish_reason": finish, "prompt_token_ids": [1] * 9}
    choice["token_ids"] = token_ids
    return framed({"id": "x", "created": created, "choices": [choice]})


def opening(created: int = 100) -> str:
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    content = {"id": "x", "created": created, "choices": [choice], "prompt_token_ids": [1, 2]}
    return framed(content)


def usage(created: int) -> str:
    return framed({"id": "x", "created": created, "choices": [], "usage": {"total_tokens": 7}})


def framed(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def parts(method: Method, sent: Sent, events: list[str]) -> list[Output]:
    stream = StreamParts(method, sent, "d1")
    taken = [part for part in map(stream.take, events) if part is not None]
    end = stream.end()
    return taken if end is None else [*taken, end]


def events_of(output: Output) -> str:
    assert isinstance(output.content, str)
    return output.content


def read(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def client_text(outputs: list[Output]) -> str:
    texts = []
    for item in (item for output in outputs for item in read(events_of(output))):
        if item != "[DONE]" and item["choices"]:
            choice = item["choices"][0]
            texts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(texts)


def test_client_sees_no_token_ids_and_the_end_comes_at_once() -> None:
    events = [
        opening(),
        event("chat", "He", [5]),
        event("chat", "", [6]),
        event("chat", "y", [7], finish="stop"),
        usage(100),
        DONE,
    ]

    first, second, third, last = outputs = parts("chat", Sent(), events)

    assert [(o.token_ids, o.text) for o in outputs] == [
        ((), ""),
        ((5,), "He"),
        ((6,), ""),
        ((), ""),
    ]
    assert all(output.resumable and output.replica_id == "d1" for output in outputs)
    seen = [read(events_of(output)) for output in outputs]
    assert [len(items) for items in seen] == [1, 1, 1, 3]
    assert seen[3][2] == "[DONE]"
    assert seen[0][0]["prompt_token_ids"] is None
    assert seen[1][0]["choices"][0] == {
        "index": 0,
        "delta": {"content": "He"},
        "finish_reason": None,
        "token_ids": None,
    }
    assert first.created == second.created == third.created == 100
    assert events_of(last).count("data: ") == 3


def test_prompts_tokens_are_not_shown_either() -> None:
    (output,) = parts("completions", Sent(), [event("completions", "a", [5])])

    assert read(events_of(output))[0]["choices"][0]["prompt_token_ids"] is None


@pytest.mark.parametrize("method", ["chat", "completions"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_cut_anywhere_any_number_of_times_is_one_answer(
    method: Method, data: st.DataObject
) -> None:
    """Tokens of one to three characters; a replica sends some, then the next begins anew."""
    texts = data.draw(st.lists(st.text(max_size=3), min_size=1, max_size=12))
    transcript, seen = Transcript(Sent()), []
    for attempt in range(4):
        sent = transcript.sent()
        assert sent is not None
        known = len(sent.token_ids)
        pieces = cut(data, list(enumerate(texts))[known:])
        if known and pieces:
            pieces[0] = list(enumerate(texts))[:known] + pieces[0]
        events = [opening(attempt)] if method == "chat" else []
        for piece in pieces[:-1]:
            text = "".join(text for _, text in piece)
            events.append(event(method, text, [i for i, _ in piece], created=attempt))
        for piece in pieces[-1:]:
            text = "".join(text for _, text in piece)
            ids = [i for i, _ in piece]
            events.append(event(method, text, ids, created=attempt, finish="length"))
        events += [usage(attempt), DONE]
        dies = attempt < 3 and data.draw(st.integers(0, len(events)))
        stream = StreamParts(method, sent, "d1")
        outputs = [stream.take(e) for e in (events if attempt == 3 else events[:dies])]
        outputs.append(stream.end() if attempt == 3 or dies == len(events) else None)
        for output in outputs:
            if output is not None:
                transcript.add(output)
                seen.append(output)
        if seen and "[DONE]" in events_of(seen[-1]):
            break
    assert client_text(seen) == "".join(texts)
    items = [item for output in seen for item in read(events_of(output))]
    assert items.count("[DONE]") == 1
    told = [item for item in items if item != "[DONE]"]
    assert len({item["created"] for item in told}) == 1
    reasons = [item["choices"][0]["finish_reason"] for item in told if item["choices"]]
    assert [reason for reason in reasons if reason] == ["length"]
    roles = [item for item in told if item["choices"] and "role" in str(item["choices"])]
    assert len(roles) == (method == "chat")


def cut(data: st.DataObject, items: list[Any]) -> list[list[Any]]:
    """Tokens in events: one or more in each."""
    pieces: list[list[Any]] = []
    while items:
        size = data.draw(st.integers(1, len(items)))
        pieces.append(items[:size])
        items = items[size:]
    return pieces


def test_stream_that_begins_otherwise_is_not_joined() -> None:
    sent = Sent((5, 6), "Hello", 100)

    with pytest.raises(ContinuationMismatch):
        parts("chat", sent, [opening(), event("chat", "Help, ", [5, 6, 7])])


@pytest.mark.parametrize(
    "odd",
    [
        event("chat", None, [5], reasoning="hm"),
        event("chat", None, [5], tool_calls=[{"index": 0}]),
        event("chat", "text", None),
    ],
    ids=["reasoning", "tool call", "tokens untold"],
)
def test_more_than_text_goes_through_but_cannot_go_on(odd: str) -> None:
    before, during, after = parts("chat", Sent(), [opening(), odd, event("chat", "a", [6])])

    assert before.resumable
    assert not during.resumable
    assert not after.resumable
    assert read(events_of(during))[0]["choices"][0]["delta"] == read(odd)[0]["choices"][0]["delta"]


def test_tokens_that_the_parser_keeps_are_told_but_not_shown() -> None:
    kept, shown = parts("chat", Sent(), [event("chat", None, [5]), event("chat", "a", [6])])

    assert (kept.content, kept.token_ids) == ("", (5,))
    assert (shown.text, shown.token_ids) == ("a", (6,))


def test_error_of_the_engine_passes_and_ends_all() -> None:
    error = 'data: {"error":{"message":"x"}}\n\n'
    told, done = parts("chat", Sent(), [error, DONE])

    assert (told.content, done.content) == (error, DONE)
    assert not told.resumable


def test_transcript_of_a_request_that_cannot_go_on_stays_empty() -> None:
    transcript = Transcript(None)
    transcript.add(Output("x", "d1", text="a", token_ids=(1,), resumable=True))

    assert transcript.sent() is None
