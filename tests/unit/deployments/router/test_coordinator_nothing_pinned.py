"""Nothing is pinned for a request that is over, whatever happened to it."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

from deployments.errors import NoReplica, ServiceUnavailable
from deployments.router.coordinator import Coordinator
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer, Sent
from tests.support.scripted.replicas import BAD, POLICY, answer_of, lost
from tests.support.scripted.world import DecodeCall, World

AT_ONCE = 2


class AnyTraffic(RuleBasedStateMachine):
    """Requests with prompts and samples; calls for them end in any way, and clients leave."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World()
        self.coordinator = Coordinator(self.world, POLICY, prompts_at_once=AT_ONCE)
        self.clients: list[asyncio.Task[None]] = []
        self.asked = 0

    def teardown(self) -> None:
        for client in self.clients:
            client.cancel()
        self.settle()
        assert self.world.pinned == {}
        assert [*self.world.prefills, *self.world.decodes] == [], "replicas work for nobody"
        self.loop.run_until_complete(self.coordinator.drain())
        self.loop.close()

    def settle(self) -> None:
        async def rounds() -> None:
            for _ in range(40):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rounds())
        self.clients = [client for client in self.clients if not client.done()]

    def pick(self, calls: list[Any], data: st.DataObject) -> Any:
        return calls[data.draw(st.integers(0, len(calls) - 1))]

    # -- what happens --

    @precondition(lambda self: len(self.clients) < 3)
    @rule(prompts=st.integers(1, 4), samples=st.integers(1, 2), stream=st.booleans())
    def asks(self, prompts: int, samples: int, stream: bool) -> None:
        self.asked += 1
        same = f"same {self.asked}"
        prompt: Any = same if prompts == 1 else [same] * prompts
        body = CompletionRequest(model="m", prompt=prompt, n=samples, stream=stream)
        sent = Sent() if stream and samples == 1 else None
        request = GenerationRequest("completions", body, sent=sent)

        async def client() -> None:
            try:
                await answer_of(self.coordinator, request)
            except ServiceUnavailable:
                return

        self.clients.append(self.loop.create_task(client()))
        self.settle()

    @precondition(lambda self: self.world.prefills)
    @rule(
        data=st.data(),
        how=st.sampled_from(["ticket", "ticket", "broken", "none", "refused", "lost", "nobody"]),
        client_leaves=st.booleans(),
    )
    def prefill_ends(self, data: st.DataObject, how: str, client_leaves: bool) -> None:
        call = self.pick(self.world.prefills, data)
        readers = call.request.body.n
        match how:
            case "ticket":
                call.done.set_result(PrefillAnswer("p", self.world.offer(readers)))
            case "broken":
                call.done.set_result(
                    PrefillAnswer("p", self.world.offer(readers, num_tokens="many"))
                )
            case "none":
                call.done.set_result(PrefillAnswer("p"))
            case "refused":
                call.done.set_result(PrefillAnswer("p", error=BAD))
            case "lost":
                call.done.set_exception(lost(self.world.kill("prefill"), "prefill"))
            case "nobody":
                call.done.set_exception(NoReplica("prefill", 1.0))
        if client_leaves:
            self.pick(self.clients, data).cancel()
        self.settle()

    def begun(self, want: bool) -> list[DecodeCall]:
        return [call for call in self.world.decodes if bool(call.outputs) is want]

    @precondition(lambda self: self.begun(False))
    @rule(data=st.data(), how=st.sampled_from(["unread", "refused", "lost", "nobody", "nothing"]))
    def decode_does_not_begin(self, data: st.DataObject, how: str) -> None:
        call = self.pick(self.begun(False), data)
        items: dict[str, Output | Exception | None] = {
            "unread": Output("", "d", unread=True),
            "refused": Output(BAD, "d"),
            "lost": lost(self.world.engine("decode")),
            "nobody": NoReplica("decode", 1.0),
            "nothing": None,
        }
        if how == "lost":
            self.world.kill("decode")
        call.items.put_nowait(items[how])
        self.settle()

    @precondition(lambda self: self.world.decodes)
    @rule(data=st.data(), resumable=st.booleans())
    def decode_says_more(self, data: st.DataObject, resumable: bool) -> None:
        call = self.pick(self.world.decodes, data)
        if not call.request.body.stream:
            return
        call.outputs += 1
        # Of several samples only one need have read when the first output comes.
        self.world.read(call.ticket)
        call.items.put_nowait(
            Output(call.content(last=False), "d", text="x", token_ids=(1,), resumable=resumable)
        )
        self.settle()

    @precondition(lambda self: self.world.decodes)
    @rule(data=st.data())
    def decode_ends(self, data: st.DataObject) -> None:
        call = self.pick(self.world.decodes, data)
        self.world.read(call.ticket, readers=99)
        call.items.put_nowait(Output(call.content(last=True), "d"))
        call.items.put_nowait(None)
        self.settle()

    @precondition(lambda self: self.begun(True))
    @rule(data=st.data())
    def decode_is_lost_in_mid_stream(self, data: st.DataObject) -> None:
        self.pick(self.begun(True), data).items.put_nowait(lost(self.world.kill("decode")))
        self.settle()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        self.pick(self.clients, data).cancel()
        self.settle()

    @rule(decoders=st.integers(0, 3))
    def decode_replicas_come_and_go(self, decoders: int) -> None:
        self.world.decoders = decoders

    # -- what always holds --

    @invariant()
    def never_leaked(self) -> None:
        """What is pinned is in the hands of a running decode call, and told of once at most."""
        held = {call.ticket.handoff_id for call in self.world.decodes if call.ticket}
        assert set(self.world.pinned) <= held
        assert len(self.world.told) == len(set(self.world.told))

    @invariant()
    def never_stuck(self) -> None:
        """A request that is not over waits for a replica; one that is over keeps none busy."""
        calls = len(self.world.prefills) + len(self.world.decodes)
        assert bool(calls) == bool(self.clients)
        assert calls <= AT_ONCE * len(self.clients)


AnyTraffic.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase
