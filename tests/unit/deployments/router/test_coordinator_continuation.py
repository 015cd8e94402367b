"""Streams whose decode replica is lost and that go on with another one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.errors import ContinuationMismatch, NoReplica
from deployments.streams.generation import Output, PrefillAnswer, Sent
from tests.support.scripted.replicas import BAD, T1, T2, FakeCaller, lost, part, served


def test_broken_stream_goes_on_with_what_the_client_has() -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", T1), PrefillAnswer("p2", T2)],
        [[part("a", 1), part("bc", 2, 3), lost("d1")], [Output("", "d2"), part("d", 4)]],
    )

    assert served(caller, sent=Sent()) == ["data: a\n\n", "data: bc\n\n", "data: d\n\n"]
    assert caller.calls() == [
        ("prefill", set()),
        ("decode", set()),
        ("prefill", set()),
        ("decode", {"d1"}),
    ]
    assert caller.sent == [Sent(), Sent(), Sent((1, 2, 3), "abc"), Sent((1, 2, 3), "abc")]
    assert caller.brought() == [None, T1, None, T2]
    assert caller.aborted == []


def test_stream_goes_on_twice() -> None:
    caller = FakeCaller(
        [],
        [
            [part("a", 1), lost("d1")],
            [part("", 2), part("b", 3), lost("d2", held=False)],
            [part("c", 4)],
        ],
    )

    assert served(caller, sent=Sent(), bypass=True)[-1] == "data: c\n\n"
    assert caller.sent == [Sent(), Sent((1,), "a"), Sent((1, 2, 3), "ab")]


@pytest.mark.parametrize(
    ("sent", "resumable"), [(None, True), (Sent(), False)], ids=["must not", "tokens untold"]
)
def test_stream_that_cannot_go_on_ends_with_an_error(sent: Sent | None, resumable: bool) -> None:
    caller = FakeCaller([], [[part("a", 1, resumable=resumable), lost("d1")]])

    first, last = served(caller, sent=sent, bypass=True)

    assert first == "data: a\n\n"
    assert '"code": 503' in last
    assert last.endswith("data: [DONE]\n\n")
    assert len(caller.calls()) == 1


@pytest.mark.parametrize(
    "then",
    [
        [[BAD]],
        [[ContinuationMismatch("it does not begin alike")]],
        [[lost("d2")], [lost("d3")]],
        [[NoReplica("decode", 1.0)]] * 2,
        [[]],
    ],
    ids=["refused", "another text", "all lost", "none there", "no output"],
)
def test_failed_continuation_ends_with_one_error(then: list[Any]) -> None:
    caller = FakeCaller([], [[part("a", 1), lost("d1")], *then])

    first, last = served(caller, sent=Sent(), bypass=True)

    assert first == "data: a\n\n"
    event, done, rest = last.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
    assert (done, rest) == ("data: [DONE]", "")


def test_prefill_that_refuses_the_longer_prompt_ends_the_stream() -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", T1), PrefillAnswer("p1", error=BAD)],
        [[part("a", 1), lost("d1")]],
    )

    _, last = served(caller, sent=Sent())

    assert "temperature: too hot" in last
    assert caller.aborted == []
