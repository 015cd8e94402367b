"""The text of server-sent events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import AnswerUnreadable
from deployments.streams.framing import (
    DONE,
    WholeEvents,
    content_of,
    each,
    error_event,
    framed,
    tells_error,
)

EVENT = 'data: {"text":"é"}\n\n'
ERROR = 'data: {"error": {"code": 503}}\n\n'


def test_the_text_is_as_openai_streams_it() -> None:
    assert framed({"text": "é"}) == EVENT
    assert error_event({"error": {"code": 503}}) == ERROR
    assert DONE == "data: [DONE]\n\n"


def test_events_tell_what_they_are() -> None:
    assert content_of(EVENT) == {"text": "é"}
    assert content_of(": a comment\n\n") is None
    assert [tells_error(event) for event in (ERROR, framed({"error": {}}), EVENT, DONE)] == [
        *(True, True, False, False)
    ]
    with pytest.raises(AnswerUnreadable):
        content_of("data: 5\n\n")


@given(st.lists(st.sampled_from([EVENT, ERROR, ": a comment\n\n"])), st.data())
def test_events_are_whole_however_they_come(events: list[str], data: st.DataObject) -> None:
    sent = "".join([*events, DONE]).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    whole = WholeEvents()

    told = [
        whole.take(sent[begin:end])
        for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)
    ]

    assert all(text.endswith("\n\n") for text in told if text)
    assert list(each("".join(told))) == [*events, DONE]


def test_what_has_no_end_yet_waits_for_it() -> None:
    whole = WholeEvents()
    assert whole.take(b"data: {}\n") == ""
    assert whole.take(b"\ndata: ") == "data: {}\n\n"
    assert whole.take(b"{}\n\n") == "data: {}\n\n"
