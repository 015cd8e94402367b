"""When a stream that says it is done really ended."""

from __future__ import annotations

import pytest

from deployments.callers.http_body import answers
from deployments.streams.generation import Method
from deployments.streams.stream_end import StreamEnd

END_0 = 'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n'
END_1 = 'data: {"choices":[{"index":1,"delta":{},"finish_reason":"length"}]}\n\n'
OPEN = 'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
QUOTED = OPEN.replace('"a"', r'"\"finish_reason\":\"stop\""')
ERROR = 'data: {"error":{"message":"no","code":500}}\n\n'
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("choices", "parts", "sound"),
    [
        (1, [DONE], False),
        (1, [OPEN, DONE], False),
        (1, [QUOTED + DONE], False),
        (1, [OPEN, END_0, DONE], True),
        (1, [OPEN + END_0 + DONE], True),
        (1, [OPEN, ERROR + DONE], True),
        (2, [END_0, END_0, DONE], False),
        (2, [END_0, END_1 + DONE], True),
        (1, ['data: {"finish_reason": "x"\n\n'], False),
        (1, ['data: [{"finish_reason": "x"}]\n\n'], False),
        (1, ['data: {"choices": {"finish_reason": "x"}}\n\n'], False),
        (1, ['data: {"finish_reason": "x", "deep": ' + "[" * 100_000 + "\n\n"], False),
    ],
)
def test_every_choice_needs_a_reason(choices: int, parts: list[str], sound: bool) -> None:
    end = StreamEnd(choices)
    for part in parts:
        end.take(part)
    assert end.sound is sound


@pytest.mark.parametrize(
    ("method", "fields", "count"),
    [
        ("completions", {"prompt": "a"}, (1, 1)),
        ("completions", {"prompt": ["a", "b"], "n": 3}, (2, 3)),
        ("completions", {"prompt": [1, 2]}, (1, 1)),
        ("chat", {"messages": [], "n": 2}, (1, 2)),
        ("chat", {"messages": [], "n": None}, (1, 1)),
        ("chat", {"messages": [], "prompt": ["a", "b"]}, (1, 1)),
    ],
)
def test_how_many_choices_a_request_asks_for(
    method: Method, fields: dict[str, object], count: tuple[int, int]
) -> None:
    assert answers(method, fields) == count
