"""Any JSON in place of a ticket: the prompt is computed again, and nothing stays pinned for it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.callers.http_body import JsonBody
from deployments.callers.http_caller import HttpCaller
from deployments.callers.http_servers import HttpServers
from deployments.callers.replica_caller import ReplicaCaller
from deployments.replicas import prefill as prefill_module
from deployments.replicas.engine import BatonEngine
from deployments.replicas.prefill import PrefillServer
from deployments.route_hint import RouteHint
from deployments.router.coordinator import Coordinator
from deployments.router.request_state import RetryPolicy
from deployments.streams.generation import GenerationRequest, Output
from tests.support.scripted.handles import FakeHandle, Script
from tests.support.scripted.http_session import FakeAnswer, FakeSession
from tests.support.scripted.replicas import POLICY, answer_of, drive, generation
from tests.support.scripted.tickets import instead_of, make_ticket
from transfer.ticket import Ticket, read_ticket

# The engine is imported here, and with it Ray and vLLM.
pytestmark = pytest.mark.timeout(90)

GOOD = make_ticket().to_params()
EVENT = 'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}\n\n'
DONE = "data: [DONE]\n\n"
BROKEN: list[Any] = [
    {**GOOD, "num_tokens": "many"},
    {**GOOD, "readers": []},
    {**GOOD, "version": 99},
    {**GOOD, "handoff_id": 3},
    [GOOD],
    "ticket",
    False,
]


# ---- through Serve -------------------------------------------------------------------------------


class Replicas(ReplicaCaller):
    """Replicas of which one prefills, and decode says what it got."""

    def __init__(self, prefill: Script) -> None:
        self.prefill_handle = FakeHandle({"p1": prefill})
        handles: Any = self.prefill_handle, FakeHandle()
        super().__init__(*handles, pick_timeout_s=1.0)
        self.brought: list[Any] = []

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        self.brought.append(request.body.kv_transfer_params)
        yield Output(EVENT + DONE, "d1")

    def given_up(self) -> list[str]:
        calls = self.prefill_handle.calls
        return [ids[0] for _, method, (ids, *_) in calls if method == "abort_handoffs"]


def prefill_server(ticket: Any) -> Script:
    """A prefill replica whose engine ends a prompt with ``ticket``."""

    async def generate(*args: Any, **more: Any) -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(kv_transfer_params=ticket)

    async def nothing(*args: Any) -> None:
        return None

    async def rendered(request: GenerationRequest) -> Any:
        serving = SimpleNamespace(_get_priority=lambda body, raw_request: 0)
        return SimpleNamespace(prompts=[{}], serving=serving, lora_request=None)

    engine: Any = BatonEngine.__new__(BatonEngine)
    engine._engine_client = SimpleNamespace(generate=generate, errored=False)
    engine._rendered = rendered
    # Ray's part of a server would have to be ended.
    server: Any = SimpleNamespace(
        engine=engine,
        _maybe_add_request_id_to_request=nothing,
        _maybe_resolve_lora_from_multiplex=nothing,
    )

    async def script(method_name: str, *args: Any) -> Any:
        if method_name != "prefill":
            return 1
        return await PrefillServer.prefill(server, RouteHint(), *args)

    return script


def through_serve(ticket: Any) -> Replicas:
    """The replicas when a request has been answered."""
    replicas = Replicas(prefill_server(ticket))

    async def main() -> None:
        coordinator = Coordinator(replicas, POLICY)
        assert await answer_of(coordinator, generation()) == [EVENT + DONE]
        await coordinator.drain()

    # Not by hypothesis's own fixtures, which are made once for all examples.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_module, "own_replica_id", lambda: "p1")
        drive(main())
    return replicas


@given(instead_of(GOOD))
@settings(deadline=None)
def test_any_json_of_a_replica(ticket: Any) -> None:
    replicas = through_serve(ticket)

    read = read_ticket(ticket)
    if isinstance(read, Ticket):
        assert replicas.brought == [read.to_params()]
        assert replicas.given_up() == []
    else:
        assert replicas.brought == [None]
        # Its owner hears of it, if it can be named at all.
        assert replicas.given_up() == ([read.handoff_id] if read.handoff_id else [])


@pytest.mark.parametrize("ticket", BROKEN)
def test_a_ticket_of_a_replica_that_cannot_be_read_is_recomputed(ticket: Any) -> None:
    assert through_serve(ticket).brought == [None]


# ---- over HTTP -----------------------------------------------------------------------------------


def over_http(answer: bytes) -> list[Any]:
    """What decode got, once for each time that it was asked."""
    session: Any = FakeSession(
        {
            "http://p": FakeAnswer(answer),
            "http://d": FakeAnswer((EVENT + DONE).encode(), content_type="text/event-stream"),
        }
    )
    servers = HttpServers({"prefill": ["http://p"], "decode": ["http://d"]}, None)
    caller = HttpCaller(session, servers, None)
    body = JsonBody({"model": "m", "prompt": "Once", "stream": True}, {})

    async def main() -> None:
        coordinator = Coordinator(caller, RetryPolicy(attempts=2, backoff_s=0.0))
        request = GenerationRequest("completions", body)
        assert await answer_of(coordinator, request) == [EVENT + DONE]
        await coordinator.drain()

    drive(main())
    return [fields.get("kv_transfer_params") for url, fields in session.asked if url == "http://d"]


@given(instead_of(GOOD))
@settings(deadline=None)
def test_any_json_of_a_server(ticket: Any) -> None:
    # As JSON has it: floats that are no numbers among it, and text that UTF-8 does not have.
    read = read_ticket(json.loads(json.dumps(ticket)))

    brought = over_http(json.dumps({"choices": [], "kv_transfer_params": ticket}).encode())

    assert brought == [read.to_params() if isinstance(read, Ticket) else None]


@pytest.mark.parametrize("ticket", BROKEN)
def test_a_ticket_of_a_server_that_cannot_be_read_is_recomputed(ticket: Any) -> None:
    assert over_http(json.dumps({"kv_transfer_params": ticket}).encode()) == [None]


@given(instead_of(GOOD).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=8))
@settings(deadline=None)
def test_any_answer_of_a_server_that_has_no_ticket(answer: bytes) -> None:
    assert over_http(answer) == [None]


def test_an_answer_that_is_nested_too_deep_to_be_read() -> None:
    assert over_http(b'{"kv_transfer_params":' + b"[" * 100_000) == [None]
