"""Requests with several prompts: each has a hand-off of its own, and the client gets one answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

from deployments.errors import NoReplica, ServiceUnavailable
from deployments.router.coordinator import Coordinator
from deployments.router.router_event import RouterEvent
from deployments.streams.answer import WholeAnswer
from deployments.streams.generation import PrefillAnswer
from tests.support.scripted.replicas import (
    BAD,
    POLICY,
    T1,
    T2,
    FakeCaller,
    answer_of,
    drive,
    generation,
    lost,
)

DONE = "data: [DONE]\n\n"


def event(text: str, **more: Any) -> str:
    return (
        f"data: {json.dumps({'created': 1, 'choices': [{'index': 0, 'text': text}], **more})}\n\n"
    )


def answer(text: str, status: int = 200) -> WholeAnswer:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    content = {"created": 1, "choices": [{"index": 0, "text": text}], "usage": usage}
    return WholeAnswer(json.dumps(content).encode(), status)


def served(
    caller: FakeCaller, *, stream: bool = True, at_once: int = 1, raises: type | None = None
) -> tuple[list[Any], list[RouterEvent]]:
    """What a request with two equal prompts gets; one after the other unless told otherwise."""
    items: list[Any] = []
    events: list[RouterEvent] = []

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY, None, events.append, prompts_at_once=at_once)
        body = CompletionRequest(model="m", prompt=["a", "a"], stream=stream)
        answer = answer_of(coordinator, generation(body))
        if raises is not None:
            with pytest.raises(raises):
                await answer
        else:
            items.extend(await answer)
        await coordinator.drain()

    drive(main())
    assert caller.open_calls == 0
    return items, events


def prefilled() -> list[Any]:
    return [PrefillAnswer("p1", T1), PrefillAnswer("p2", T2)]


def choices(items: list[Any]) -> list[tuple[int, str]]:
    told = [json.loads(item.removeprefix("data: ")) for item in items if item != DONE]
    return [(one["index"], one["text"]) for content in told for one in content["choices"]]


def test_equal_prompts_bring_a_ticket_each() -> None:
    caller = FakeCaller(prefilled(), [[event("x"), DONE], [event("y"), DONE]])

    items, _ = served(caller)

    assert choices(items[:-1]) == [(0, "x"), (1, "y")]
    assert items[-1] == DONE
    assert [call for call, _ in caller.calls()] == [
        *("check", "prefill", "decode", "prefill", "decode")
    ]
    assert caller.brought() == [None, T1, None, T2]
    # Replicas know them apart.
    names = [request.request_id for request in caller.requests]
    assert names[0] == names[1] != names[2] == names[3]
    assert caller.aborted == []


def test_whole_answers_become_one() -> None:
    caller = FakeCaller(prefilled(), [[answer("x")], [answer("y")]])

    (item,), _ = served(caller, stream=False)

    content = json.loads(item.content)
    assert [(one["index"], one["text"]) for one in content["choices"]] == [(0, "x"), (1, "y")]
    assert content["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_what_is_wrong_with_one_prompt_is_said_before_any_is_computed() -> None:
    caller = FakeCaller(checks=[BAD])

    assert served(caller) == ([BAD], [])
    assert [call for call, _ in caller.calls()] == ["check"]


@pytest.mark.parametrize("gone", [NoReplica("decode", 1.0), lost("p1", "prefill")])
def test_prompts_that_nobody_could_check_are_tried(gone: Exception) -> None:
    caller = FakeCaller(prefilled(), [[event("x"), DONE], [event("y"), DONE]], checks=[gone])

    items, _ = served(caller)

    assert choices(items[:-1]) == [(0, "x"), (1, "y")]


@pytest.mark.parametrize("refusal", [BAD, answer("no", 400)])
def test_refusal_of_one_prompt_refuses_all(refusal: Any) -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1), PrefillAnswer("p2", error=refusal)], [["hang"]])

    assert served(caller, at_once=2) == ([refusal], [])
    # The other one was given up at once.
    assert caller.aborted == [("p1", T1)]


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (BAD, {"message": "temperature: too hot", "type": "bad", "param": None, "code": 400}),
        (
            WholeAnswer(b'{"error": {"message": "no", "code": 400}}', 400),
            {"message": "no", "code": 400},
        ),
        (
            WholeAnswer(b"no", 400),
            {"message": "no", "type": "server_error", "param": None, "code": 503},
        ),
        (
            WholeAnswer(b"[" * 2000, 400),
            {"message": "[" * 2000, "type": "server_error", "param": None, "code": 503},
        ),
    ],
    ids=["Serve", "HTTP", "no JSON", "too deep"],
)
def test_refusal_in_mid_stream_is_an_event(refusal: Any, error: dict[str, Any]) -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", T1), PrefillAnswer("p2", error=refusal)], [[event("x"), DONE]]
    )

    items, _ = served(caller)

    assert choices(items[:1]) == [(0, "x")]
    last, done, rest = items[1].split("\n\n")
    assert json.loads(last.removeprefix("data: ")) == {"error": error}
    assert (done + "\n\n", rest, len(items)) == (DONE, "", 2)


def test_no_replica_for_one_prompt_is_an_error_for_all() -> None:
    nobody = [[NoReplica("decode", 1.0)]] * 3
    caller = FakeCaller(prefilled(), [[answer("x")], *nobody])

    assert served(caller, stream=False, raises=ServiceUnavailable)[0] == []
    assert caller.aborted == [("p2", T2)]


def test_no_replica_for_one_prompt_ends_the_stream_with_an_error() -> None:
    nobody = [[NoReplica("decode", 1.0)]] * 3
    caller = FakeCaller(prefilled(), [[event("x"), DONE], *nobody])

    items, events = served(caller)

    assert choices(items[:1]) == [(0, "x")]
    assert items[1].endswith(DONE)
    assert '"server_error"' in items[1]
    assert events[-1] is RouterEvent.STREAM_BROKEN


def test_an_error_event_of_one_prompt_ends_the_stream() -> None:
    error = 'data: {"error":{"message":"no"}}\n\n'
    caller = FakeCaller(prefilled(), [[error, DONE], ["hang"]])

    items, _ = served(caller, at_once=2)

    assert items == [error, DONE]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_cannot_be_read_is_an_error(stream: bool) -> None:
    bad = "data: 5\n\n" if stream else WholeAnswer(b"5")
    caller = FakeCaller(prefilled(), [[bad], [bad]])

    assert served(caller, stream=stream, raises=ServiceUnavailable)[0] == []
