"""Whatever a client sends as a body is either valid or its own, named fault."""

from __future__ import annotations

import pickle
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from pydantic import BaseModel, TypeAdapter, ValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeCompletionRequest,
)

from serve_app.ingress import request_models
from tests.support.load.malformed_requests import bodies

COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Once"}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
MODELS: dict[type[BaseModel], tuple[Any, dict[str, Any]]] = {
    CompletionRequest: (request_models.Completion, COMPLETION),
    ChatCompletionRequest: (request_models.Chat, CHAT),
    TokenizeCompletionRequest: (request_models.Tokenize, COMPLETION),
    DetokenizeRequest: (request_models.Detokenize, {"tokens": [1]}),
}


def refusal(model: type[BaseModel], changes: dict[str, Any]) -> tuple[str, str] | None:
    """The field and the message of a good body with changes; None if it is valid."""
    annotated, good = MODELS[model]
    try:
        TypeAdapter(annotated).validate_python({**good, **changes})
    except ValidationError as error:
        (fault,) = error.errors()
        return ".".join(map(str, fault["loc"])), fault["msg"]
    return None


def message(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


TEXT = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (message([{"type": "smell"}]), "messages.0.content.0.text"),
        (message([{"text": "no type"}]), "messages.0.content.0.type"),
        (message(["plain", "strings"]), "messages.0.content.0"),
        (message([[TEXT]]), "messages.0.content.0"),
        (message([{"type": "smell"}], role="system"), "messages.0.content.0.text"),
        (message([{"type": "smell"}], role="tool", tool_call_id="c"), "messages.0.content.0.text"),
        (message("a", tool_calls=5), "messages.0.tool_calls"),
        (message("a", role="assistant", tool_calls=5), "messages.0.tool_calls"),
        (message("a", role="assistant", tool_calls=[5]), "messages.0.tool_calls.0"),
        (message("a\ud800"), "messages.0.content"),
        ({"messages": None}, "messages"),
        ({"messages": 5}, "messages"),
        ({"tools": 5, "tool_choice": {"function": {"name": "f"}}}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools.0.function"),
        ({"structured_outputs": "text"}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"stop": ["s"] * 200}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": "5" * 5}, "logprobs"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(changes: dict[str, Any], field: str) -> None:
    told = refusal(ChatCompletionRequest, changes)

    assert told is not None
    assert told[0] == field


@pytest.mark.parametrize(
    "speaker", [{"role": "user"}, {"role": "system"}, {"role": "tool", "tool_call_id": "c"}]
)
@pytest.mark.parametrize(
    ("content", "more", "field"),
    [
        ("a", {"tool_calls": 5}, "tool_calls"),
        ("a", {"tool_calls": "5"}, "tool_calls"),
        ([{"text": "no type"}], {}, "content.0.type"),
        (["plain", "strings"], {}, "content.0"),
        ([[TEXT]], {}, "content.0"),
    ],
)
def test_a_wrong_part_is_named_whoever_speaks(
    speaker: dict[str, Any], content: Any, more: dict[str, Any], field: str
) -> None:
    told = refusal(ChatCompletionRequest, message(content, **speaker, **more))

    assert told is not None
    assert told[0] == f"messages.0.{field}"


def test_a_stop_list_that_is_too_long_is_called_so() -> None:
    told = refusal(CompletionRequest, {"stop": ["s"] * 200})

    assert told is not None
    assert "at most" in told[1]


def test_what_was_not_said_to_be_json_is_told_by_its_header() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(request_models.Chat).validate_python(b'{"messages": []}')

    assert [fault["loc"] for fault in caught.value.errors()] == [("Content-Type",)]


def test_parts_of_all_roles_are_lists_that_travel() -> None:
    parts = [TEXT, {"type": "text", "text": "you"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": parts},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
        {"role": "other", "content": parts},
    ]

    body = TypeAdapter(request_models.Chat).validate_python({**CHAT, "messages": messages})

    assert pickle.loads(pickle.dumps(body)).messages == messages


# ---- numbers -------------------------------------------------------------------------------------


def kinds(annotation: Any, lists: int = 0) -> set[tuple[type, int]]:
    """Kinds of numbers in an annotation, each with how many lists are around it."""
    if annotation in (int, float):
        return {(annotation, lists)}
    if get_origin(annotation) is dict:
        return set()
    deeper = lists + (get_origin(annotation) is list)
    found = (kinds(part, deeper) for part in get_args(annotation) if part is not Ellipsis)
    return set().union(*found)


NUMERIC = [
    (model, name, kind, lists)
    for model in MODELS
    for name, info in model.model_fields.items()
    for kind, lists in sorted(kinds(info.annotation), key=str)
]


def test_the_models_have_the_numbers_that_are_looked_for() -> None:
    assert (CompletionRequest, "top_k", int, 0) in NUMERIC
    assert (CompletionRequest, "prompt", int, 2) in NUMERIC
    assert (ChatCompletionRequest, "temperature", float, 0) in NUMERIC
    assert (DetokenizeRequest, "tokens", int, 1) in NUMERIC
    assert len(NUMERIC) > 40


@pytest.mark.parametrize(
    ("model", "name", "kind", "lists"),
    NUMERIC,
    ids=[f"{model.__name__}-{name}-{lists}" for model, name, _, lists in NUMERIC],
)
def test_every_number_of_the_api_is_bounded_by_what_the_engine_holds(
    model: type[BaseModel], name: str, kind: type, lists: int
) -> None:
    beyond: tuple[Any, ...] = (10**400, float("inf"), float("nan"), 1 << 64, -(1 << 63) - 1)
    if kind is int:
        beyond = (*beyond, 1e30, 1 << 32 if lists else 1 << 63)
    if not lists:  # a list of texts is a prompt, too
        beyond = (*beyond, "9" * 30 if kind is int else "nan", "1e999")
    for value in beyond:
        for _ in range(lists):
            value = [value]
        told = refusal(model, {name: value})
        assert told is not None, value
        assert told[0].split(".")[0] == name, value


def test_numbers_within_a_field_are_bounded_too() -> None:
    sizes = {"max_pattern_size": 1e30, "min_count": 3}
    told = refusal(CompletionRequest, {"repetition_detection": sizes})

    assert told is not None
    assert told[0] == "repetition_detection.max_pattern_size"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_any_body_is_valid_or_has_one_fault_that_can_be_told(model: type[BaseModel]) -> None:
    annotated, good = MODELS[model]
    adapter: TypeAdapter[Any] = TypeAdapter(annotated)

    @given(bodies(model, good))
    def check(body: dict[str, Any]) -> None:
        try:
            valid = adapter.validate_python(body)
        except ValidationError as error:
            (fault,) = error.errors()
            (fault["msg"] + ".".join(map(str, fault["loc"]))).encode()
        else:
            pickle.dumps(valid)

    check()
