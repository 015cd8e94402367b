"""How the coordinator carries a request through prefill and decode, and what it tells others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deployments.errors import AnswerUnreadable, NoReplica, Overloaded, ServiceUnavailable
from deployments.router.admission import Admission, AdmissionPolicy
from deployments.router.coordinator import Coordinator
from deployments.router.router_event import RouterEvent
from deployments.streams.answer import WholeAnswer
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import Output, PrefillAnswer, Sent
from tests.support.scripted.replicas import (
    BAD,
    CHUNKS,
    HANG,
    INFO,
    POLICY,
    SHARED,
    T1,
    T2,
    FakeCaller,
    answer_of,
    drive,
    generation,
    lost,
    make_request,
    part,
    served,
)

# ---- ways through --------------------------------------------------------------------------------


def test_ticket_of_prefill_goes_to_decode_and_chunks_to_the_client() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [CHUNKS])
    request = make_request()

    assert served(caller, request=request) == CHUNKS

    assert caller.log == [
        ("prefill", "completions", INFO, set()),
        ("decode", "completions", INFO, set()),
    ]
    assert caller.brought() == [None, T1]
    assert request.kv_transfer_params is None
    assert caller.requests[1].prompt == "Once"
    assert caller.aborted == []


def test_complete_response_is_passed_on() -> None:
    response = WholeAnswer(b"{}")
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[response]])

    assert served(caller) == [response]


def test_decode_comes_to_its_end_before_a_complete_response_is_passed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    response = WholeAnswer(b"{}")
    caller = FakeCaller([PrefillAnswer("p1", SHARED)], [[response, "data: more\n\n"]])

    assert served(caller) == [response]
    # All readers have read: there is nothing to give up.
    assert caller.aborted == []
    assert caplog.messages == ["a complete answer was followed by more: 'data: more\\n\\n'"]


def test_an_answer_that_never_comes_is_an_error() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[Output("", "d1")]])

    assert served(caller, raises=ServiceUnavailable) == []


def test_a_complete_answer_in_mid_stream_breaks_the_stream() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[CHUNKS[0], WholeAnswer(b"{}"), HANG]])

    assert served(caller, raises=AnswerUnreadable) == []


def test_bypass_goes_to_decode_alone() -> None:
    caller = FakeCaller([], [CHUNKS])

    assert served(caller, bypass=True) == CHUNKS
    assert caller.calls() == [("decode", set())]
    assert caller.brought() == [None]


def test_lost_prefill_replica_is_ruled_out_and_another_one_tried() -> None:
    caller = FakeCaller([lost("p1", "prefill"), PrefillAnswer("p2", T1)], [CHUNKS])

    assert served(caller) == CHUNKS
    assert caller.calls() == [("prefill", set()), ("prefill", {"p1"}), ("decode", set())]
    assert caller.brought()[2] == T1


@pytest.mark.parametrize(
    "prefills",
    [
        [NoReplica("prefill", 5.0)],
        [lost("p1", "prefill"), NoReplica("prefill", 0.0)],
        [lost(name, "prefill", held=False) for name in ("p1", "p2", "p3")],
        [PrefillAnswer("p1")],
    ],
    ids=["none there", "only one there", "all lost", "no ticket"],
)
def test_without_tickets_decode_computes_the_prompt(prefills: list[Any]) -> None:
    caller = FakeCaller(list(prefills), [CHUNKS])

    assert served(caller) == CHUNKS
    assert caller.calls()[-1] == ("decode", set())
    assert len(caller.calls()) == len(prefills) + 1
    assert caller.brought()[-1] is None
    assert caller.aborted == []


def test_request_that_prefill_refuses_never_reaches_decode() -> None:
    caller = FakeCaller([PrefillAnswer("p1", error=BAD)], [])

    assert served(caller) == [BAD]
    assert caller.calls() == [("prefill", set())]


def test_request_that_decode_refuses_gives_its_blocks_up() -> None:
    caller = FakeCaller([PrefillAnswer("p1", SHARED)], [[BAD]])

    assert served(caller) == [BAD]
    assert caller.aborted == [("p1", SHARED)]
    assert len(caller.calls()) == 2


@pytest.mark.parametrize(
    ("failures", "excluded"),
    [
        ([lost("d1")], [set(), {"d1"}]),
        ([lost("d1"), lost("d2", held=False)], [set(), {"d1"}, {"d1", "d2"}]),
        ([lost("d1"), NoReplica("decode", 5.0)], [set(), {"d1"}, set()]),
    ],
)
def test_decode_lost_before_its_first_chunk_is_replaced_with_the_same_tickets(
    failures: list[Exception], excluded: list[set[str]]
) -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [*([failure] for failure in failures), CHUNKS])

    assert served(caller) == CHUNKS
    assert caller.calls() == [("prefill", set()), *(("decode", names) for names in excluded)]
    assert caller.brought()[1:] == [T1] * len(excluded)
    assert caller.aborted == []


def test_tickets_that_decode_leaves_unread_are_given_up_at_once() -> None:
    unread = Output("", "d1", unread=True)
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[unread, *CHUNKS]])

    assert served(caller) == CHUNKS
    assert caller.aborted == [("p1", T1)]
    assert len(caller.calls()) == 2


@pytest.mark.parametrize(
    "decodes",
    [
        [[lost("d1")], [lost("d2", held=False)], [lost("d3", held=False)]],
        [[NoReplica("decode", 5.0)]] * 3,
        [[]],
    ],
    ids=["all lost", "none there", "ends without a chunk"],
)
def test_no_decode_is_an_error_and_the_blocks_are_given_up(decodes: list[Any]) -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], list(decodes))

    assert served(caller, raises=ServiceUnavailable) == []
    assert len(caller.calls()) == 1 + len(decodes)
    assert caller.aborted == [("p1", T1)]


def test_decode_lost_in_mid_stream_ends_the_stream_with_an_error_event() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[CHUNKS[0], lost("d1")]])

    first, last = served(caller)

    assert first == CHUNKS[0]
    event, done, rest = last.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["code"] == 503
    assert "lost" in error["message"]
    assert caller.aborted == []
    assert len(caller.calls()) == 2


def test_error_of_a_kind_we_do_not_know_passes_and_the_blocks_are_given_up() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[KeyError("a bug in a replica")]])

    assert served(caller, raises=KeyError) == []
    assert caller.aborted == [("p1", T1)]


# ---- what the router counts ----------------------------------------------------------------------


def test_router_counts_what_is_out_of_the_ordinary() -> None:
    unread = Output("", "d1", unread=True)
    caller = FakeCaller(
        [lost("p1", "prefill"), PrefillAnswer("p2", T1), NoReplica("prefill", 1.0)],
        [
            [NoReplica("decode", 1.0)],
            [unread, part("a", 1, created=7), lost("d1")],
            [part("b", 2, resumable=False), lost("d2", held=False)],
        ],
    )
    events: list[RouterEvent] = []

    async def main() -> None:
        admission = Admission(AdmissionPolicy(max_requests=1))
        coordinator = Coordinator(caller, POLICY, admission, events.append)
        answer = await coordinator.answer(generation(sent=Sent()))
        assert isinstance(answer, EventStream)
        with pytest.raises(Overloaded):
            await coordinator.answer(generation())
        assert len([events async for events in answer]) == 3
        await coordinator.drain()

    drive(main())
    assert [event.value for event in events] == [
        "prefill_lost",
        "suspect_tried",
        "no_decode",
        "tickets_unread",
        "refused",
        "decode_lost",
        "suspect_tried",
        "no_prefill",
        "stream_resumed",
        "decode_lost",
        "stream_broken",
    ]


def test_a_request_that_cannot_be_split_leaves_no_place_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(request: Any) -> Any:
        raise RecursionError

    monkeypatch.setattr("deployments.router.coordinator.split", fails)

    async def main() -> None:
        coordinator = Coordinator(FakeCaller(), POLICY, Admission(AdmissionPolicy(max_requests=1)))
        for _ in range(2):
            with pytest.raises(RecursionError):
                await coordinator.answer(generation())

    drive(main())


# ---- notices to owners ---------------------------------------------------------------------------


def test_client_does_not_wait_for_notices_but_drain_does() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[BAD]])

    async def main() -> None:
        caller.held = asyncio.Event()
        coordinator = Coordinator(caller, POLICY)
        assert await answer_of(coordinator, generation()) == [BAD]
        draining = asyncio.ensure_future(coordinator.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        assert caller.aborted == []

        caller.held.set()
        await draining

        assert caller.aborted == [("p1", T1)]

    drive(main())


def test_drain_with_nothing_to_do_returns() -> None:
    drive(Coordinator(FakeCaller(), POLICY).drain())


@pytest.mark.parametrize("gone", [NoReplica("prefill", 5.0), lost("p1", "prefill")])
def test_owner_that_is_gone_needs_no_notice(gone: Exception) -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[BAD]], abort_error=gone)

    assert served(caller) == [BAD]
    assert caller.aborted == [("p1", T1)]


def test_requests_do_not_see_each_other() -> None:
    caller = FakeCaller(
        [lost("p1", "prefill"), PrefillAnswer("p2", T1), PrefillAnswer("p1", T2)],
        [CHUNKS, CHUNKS],
    )

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        for _ in range(2):
            assert await answer_of(coordinator, generation()) == CHUNKS

    drive(main())
    assert caller.calls() == [
        ("prefill", set()),
        ("prefill", {"p1"}),
        ("decode", set()),
        ("prefill", set()),
        ("decode", set()),
    ]
    assert caller.brought() == [None, None, T1, None, T2]
