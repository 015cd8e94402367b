from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    CompletionRequest,
    ErrorInfo,
    ErrorResponse,
)
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from deployments.admission import Admission, AdmissionPolicy
from deployments.errors import (
    ContinuationMismatch,
    NoReplica,
    Overloaded,
    ReplicaLost,
    ServiceUnavailable,
)
from deployments.generation import GenerationRequest, Output, PrefillAnswer, Sent
from deployments.handoff import Coordinator, RouterEvent
from deployments.handoff_state import RetryPolicy

T1: dict[str, Any] = {"handoff_id": "h1", "version": 1}
T2: dict[str, Any] = {"handoff_id": "h2", "version": 1}
BAD = ErrorResponse(error=ErrorInfo(message="temperature: too hot", type="bad", code=400))
CHUNKS = ["data: one\n\n", "data: two\n\n", "data: [DONE]\n\n"]
INFO = RawRequestInfo(headers={"x-request-id": "r1"})
HANG = "hang"
"""In a script: the replica does not answer until it is cancelled."""


@dataclass
class FakeCaller:
    """Replicas that answer by a script, and remember what became of every call.

    Attributes:
        prefills: what each prefill call does: answer, raise, or hang.
        decodes: what each decode call does, chunk by chunk.
        held: unset, notices to owners do not come back.
    """

    prefills: list[Any] = field(default_factory=list)
    decodes: list[Sequence[Any]] = field(default_factory=list)
    log: list[tuple[Any, ...]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    sent: list[Sent | None] = field(default_factory=list)
    aborted: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    abort_error: Exception | None = None
    held: asyncio.Event | None = None
    open_calls: int = 0

    async def prefill(self, request: GenerationRequest, exclude: frozenset[str]) -> PrefillAnswer:
        self.log.append(("prefill", request.method, request.http, set(exclude)))
        self.requests.append(request.body)
        self.sent.append(request.sent)
        self.open_calls += 1
        try:
            step = self.prefills.pop(0)
            await self._play(step)
            assert isinstance(step, PrefillAnswer)
            return step
        finally:
            self.open_calls -= 1

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str]
    ) -> AsyncGenerator[Output, None]:
        self.log.append(("decode", request.method, request.http, set(exclude)))
        self.requests.append(request.body)
        self.sent.append(request.sent)
        self.open_calls += 1
        try:
            for step in self.decodes.pop(0):
                await self._play(step)
                if isinstance(step, Output):
                    yield step
                    continue
                yield Output(step, "d1", refused=isinstance(step, ErrorResponse))
        finally:
            self.open_calls -= 1

    def refusal(self, chunk: Any) -> Any | None:
        first = chunk[0] if isinstance(chunk, list) else chunk
        return first if isinstance(first, ErrorResponse) else None

    async def abort(self, replica_id: str, handoff_ids: tuple[str, ...]) -> int:
        if self.held is not None:
            await self.held.wait()
        self.aborted.append((replica_id, handoff_ids))
        if self.abort_error is not None:
            raise self.abort_error
        return len(handoff_ids)

    async def _play(self, step: Any) -> None:
        if step == HANG:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if isinstance(step, Exception):
            raise step

    def calls(self) -> list[tuple[str, set[str]]]:
        return [(entry[0], entry[3]) for entry in self.log]

    def brought(self) -> list[Any]:
        """``kv_transfer_params`` of every call."""
        return [request.kv_transfer_params for request in self.requests]


POLICY = RetryPolicy(attempts=3, backoff_s=0.0)


def make_request() -> Any:
    return CompletionRequest(model="m", prompt="Once", stream=True)


def generation(body: Any = None, sent: Sent | None = None) -> GenerationRequest:
    return GenerationRequest("completions", body or make_request(), INFO, sent)


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine; leftover tasks are a failure."""

    async def main() -> None:
        await coroutine
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    asyncio.run(main())


def served(
    caller: FakeCaller,
    *,
    bypass: bool = False,
    request: Any = None,
    sent: Sent | None = None,
    raises: type | None = None,
) -> list[Any]:
    """All that a request gets, with notices to owners carried out."""
    items: list[Any] = []

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        chunks = coordinator.run(generation(request, sent), bypass=bypass)
        if raises is not None:
            with pytest.raises(raises):
                items.extend([item async for item in chunks])
        else:
            items.extend([item async for item in chunks])
        await coordinator.drain()

    drive(main())
    assert caller.open_calls == 0
    return items


def lost(replica_id: str, role: str = "decode") -> ReplicaLost:
    return ReplicaLost(role, replica_id, "it died")


# ---- ways through --------------------------------------------------------------------------------


def test_ticket_of_prefill_goes_to_decode_and_chunks_to_the_client() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [CHUNKS])
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


def test_tickets_of_several_prompts_travel_together() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1, T2))], [CHUNKS])

    assert served(caller) == CHUNKS
    assert caller.brought()[1]["tickets"] == [T1, T2]
    assert caller.aborted == []


def test_complete_response_is_passed_on() -> None:
    response = object()
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[response]])

    assert served(caller) == [response]


def test_bypass_goes_to_decode_alone() -> None:
    caller = FakeCaller([], [CHUNKS])

    assert served(caller, bypass=True) == CHUNKS
    assert caller.calls() == [("decode", set())]
    assert caller.brought() == [None]


def test_lost_prefill_replica_is_ruled_out_and_another_one_tried() -> None:
    caller = FakeCaller([lost("p1", "prefill"), PrefillAnswer("p2", (T1,))], [CHUNKS])

    assert served(caller) == CHUNKS
    assert caller.calls() == [("prefill", set()), ("prefill", {"p1"}), ("decode", set())]
    assert caller.brought()[2] == T1


@pytest.mark.parametrize(
    "prefills",
    [
        [NoReplica("prefill", 5.0)],
        [lost("p1", "prefill"), NoReplica("prefill", 0.0)],
        [lost("p1", "prefill"), lost("p2", "prefill"), lost("p3", "prefill")],
        [PrefillAnswer("p1", ())],
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
    caller = FakeCaller([PrefillAnswer("p1", (T1, T2))], [[BAD]])

    assert served(caller) == [BAD]
    assert caller.aborted == [("p1", ("h1", "h2"))]
    assert len(caller.calls()) == 2


@pytest.mark.parametrize(
    ("failures", "excluded"),
    [
        ([lost("d1")], [set(), {"d1"}]),
        ([lost("d1"), lost("d2")], [set(), {"d1"}, {"d1", "d2"}]),
        ([lost("d1"), NoReplica("decode", 5.0)], [set(), {"d1"}, set()]),
    ],
)
def test_decode_lost_before_its_first_chunk_is_replaced_with_the_same_tickets(
    failures: list[Exception], excluded: list[set[str]]
) -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", (T1,))], [*([failure] for failure in failures), CHUNKS]
    )

    assert served(caller) == CHUNKS
    assert caller.calls() == [("prefill", set()), *(("decode", names) for names in excluded)]
    assert caller.brought()[1:] == [T1] * len(excluded)
    assert caller.aborted == []


def test_tickets_that_decode_leaves_unread_are_given_up_at_once() -> None:
    unread = Output("", "d1", unread=True)
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[unread, *CHUNKS]])

    assert served(caller) == CHUNKS
    assert caller.aborted == [("p1", ("h1",))]
    assert len(caller.calls()) == 2


@pytest.mark.parametrize(
    "decodes",
    [
        [[lost("d1")], [lost("d2")], [lost("d3")]],
        [[NoReplica("decode", 5.0)]] * 3,
        [[]],
    ],
    ids=["all lost", "none there", "ends without a chunk"],
)
def test_no_decode_is_an_error_and_the_blocks_are_given_up(decodes: list[Any]) -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], list(decodes))

    assert served(caller, raises=ServiceUnavailable) == []
    assert len(caller.calls()) == 1 + len(decodes)
    assert caller.aborted == [("p1", ("h1",))]


def test_decode_lost_in_mid_stream_ends_the_stream_with_an_error_event() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[CHUNKS[0], lost("d1")]])

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
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[KeyError("a bug in a replica")]])

    assert served(caller, raises=KeyError) == []
    assert caller.aborted == [("p1", ("h1",))]


# ---- streams that go on elsewhere ----------------------------------------------------------------


def part(text: str, *token_ids: int, resumable: bool = True, created: int | None = None) -> Output:
    return Output(
        f"data: {text}\n\n",
        "d1",
        text=text,
        token_ids=token_ids,
        resumable=resumable,
        created=created,
    )


def test_broken_stream_goes_on_with_what_the_client_has() -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", (T1,)), PrefillAnswer("p2", (T2,))],
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


def test_router_counts_what_is_out_of_the_ordinary() -> None:
    unread = Output("", "d1", unread=True)
    caller = FakeCaller(
        [lost("p1", "prefill"), PrefillAnswer("p2", (T1,)), NoReplica("prefill", 1.0)],
        [
            [NoReplica("decode", 1.0)],
            [unread, part("a", 1, created=7), lost("d1")],
            [part("b", 2, resumable=False), lost("d2")],
        ],
    )
    events: list[RouterEvent] = []

    async def main() -> None:
        admission = Admission(AdmissionPolicy(max_requests=1))
        coordinator = Coordinator(caller, POLICY, admission, events.append)
        chunks = coordinator.run(generation(sent=Sent()))
        assert await anext(chunks)
        with pytest.raises(Overloaded):
            await anext(coordinator.run(generation()))
        assert len([chunk async for chunk in chunks]) == 2
        await coordinator.drain()

    drive(main())
    assert [event.value for event in events] == [
        "prefill_lost",
        "no_decode",
        "tickets_unread",
        "refused",
        "decode_lost",
        "no_prefill",
        "stream_resumed",
        "decode_lost",
        "stream_broken",
    ]


def test_stream_goes_on_twice() -> None:
    caller = FakeCaller(
        [],
        [
            [part("a", 1), lost("d1")],
            [part("", 2), part("b", 3), lost("d2")],
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
        [PrefillAnswer("p1", (T1,)), PrefillAnswer("p1", error=BAD)],
        [[part("a", 1), lost("d1")]],
    )

    _, last = served(caller, sent=Sent())

    assert "temperature: too hot" in last
    assert caller.aborted == []


# ---- clients that leave --------------------------------------------------------------------------


def left_while_waiting(caller: FakeCaller, policy: RetryPolicy = POLICY) -> None:
    """The client leaves while its first chunk is awaited: Serve cancels the task."""

    async def main() -> None:
        coordinator = Coordinator(caller, policy)
        chunks = coordinator.run(generation())
        waiting = asyncio.ensure_future(anext(chunks))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert caller.open_calls == 0, "a replica still works for nobody"
        await coordinator.drain()

    drive(main())


def test_client_leaves_during_prefill() -> None:
    caller = FakeCaller([HANG], [])

    left_while_waiting(caller)

    assert caller.calls() == [("prefill", set())]
    assert caller.aborted == []


def test_client_leaves_before_the_first_chunk() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1, T2))], [[HANG]])

    left_while_waiting(caller)

    assert caller.calls() == [("prefill", set()), ("decode", set())]
    assert caller.aborted == [("p1", ("h1", "h2"))]


def test_client_leaves_during_a_pause() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[lost("d1")]])

    left_while_waiting(caller, RetryPolicy(backoff_s=60.0, backoff_max_s=60.0))

    assert caller.calls() == [("prefill", set()), ("decode", set())]
    assert caller.aborted == [("p1", ("h1",))]


def test_client_leaves_in_mid_stream_while_a_chunk_is_awaited() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[CHUNKS[0], HANG]])

    async def main() -> None:
        chunks = Coordinator(caller, POLICY).run(generation())
        assert await anext(chunks) == CHUNKS[0]
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert caller.open_calls == 0

    drive(main())
    assert caller.aborted == []


def test_closing_in_mid_stream_ends_the_decode_call_before_it_returns() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[CHUNKS[0], HANG]])

    async def main() -> None:
        chunks = Coordinator(caller, POLICY).run(generation())
        assert await anext(chunks) == CHUNKS[0]
        assert caller.open_calls == 1

        await chunks.aclose()

        assert caller.open_calls == 0

    drive(main())
    assert caller.aborted == []


def test_closing_before_the_start_calls_nobody() -> None:
    caller = FakeCaller([], [])

    async def main() -> None:
        await Coordinator(caller, POLICY).run(generation()).aclose()

    drive(main())
    assert caller.log == []


# ---- notices to owners ---------------------------------------------------------------------------


def test_client_does_not_wait_for_notices_but_drain_does() -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[BAD]])

    async def main() -> None:
        caller.held = asyncio.Event()
        coordinator = Coordinator(caller, POLICY)
        items = [item async for item in coordinator.run(generation())]
        assert items == [BAD]
        draining = asyncio.ensure_future(coordinator.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        assert caller.aborted == []

        caller.held.set()
        await draining

        assert caller.aborted == [("p1", ("h1",))]

    drive(main())


def test_drain_with_nothing_to_do_returns() -> None:
    drive(Coordinator(FakeCaller(), POLICY).drain())


@pytest.mark.parametrize("gone", [NoReplica("prefill", 5.0), lost("p1", "prefill")])
def test_owner_that_is_gone_needs_no_notice(gone: Exception) -> None:
    caller = FakeCaller([PrefillAnswer("p1", (T1,))], [[BAD]], abort_error=gone)

    assert served(caller) == [BAD]
    assert caller.aborted == [("p1", ("h1",))]


def test_requests_do_not_see_each_other() -> None:
    caller = FakeCaller(
        [lost("p1", "prefill"), PrefillAnswer("p2", (T1,)), PrefillAnswer("p1", (T2,))],
        [CHUNKS, CHUNKS],
    )

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        for _ in range(2):
            items = [item async for item in coordinator.run(generation())]
            assert items == CHUNKS

    drive(main())
    assert caller.calls() == [
        ("prefill", set()),
        ("prefill", {"p1"}),
        ("decode", set()),
        ("prefill", set()),
        ("decode", set()),
    ]
    assert caller.brought() == [None, None, T1, None, T2]
