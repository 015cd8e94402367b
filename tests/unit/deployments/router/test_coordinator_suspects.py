"""What the coordinator does with requests whose engine died under them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

from deployments.errors import NoReplica, ServiceUnavailable
from deployments.router.admission import Admission, AdmissionPolicy, PromptSize
from deployments.router.coordinator import Coordinator
from deployments.router.router_event import RouterEvent
from deployments.streams.answer import Refusal
from deployments.streams.generation import GenerationRequest, PrefillAnswer, Sent
from tests.support.scripted.replicas import (
    CHUNKS,
    HANG,
    POLICY,
    T1,
    T2,
    FakeCaller,
    answer_of,
    drive,
    generation,
    lost,
    part,
)
from tests.support.scripted.world import World

NOBODY = NoReplica("prefill", 1.0)


def of(prompt: Any) -> GenerationRequest:
    return generation(CompletionRequest(model="m", prompt=prompt, stream=True))


def answers(caller: FakeCaller, *requests: GenerationRequest) -> list[Any]:
    """What each request gets, one after the other: its items, or the exception."""
    told: list[Any] = []

    async def main() -> None:
        coordinator = Coordinator(caller, POLICY)
        for request in requests:
            try:
                told.append(await answer_of(coordinator, request))
            except ServiceUnavailable as error:
                told.append(error)
        await coordinator.drain()

    drive(main())
    assert caller.open_calls == 0
    return told


def is_refused(items: Any) -> bool:
    (answer,) = items
    assert isinstance(answer, Refusal)
    return (answer.code, answer.type) == (500, "server_error")


def test_two_engines_and_no_more_of_the_own_side_only() -> None:
    caller = FakeCaller([lost("p1", "prefill"), lost("p2", "prefill")], [CHUNKS])
    caller.wells = ["p2"]

    killer, again = answers(caller, of("killer"), of("killer"))

    assert is_refused(killer)
    assert is_refused(again)
    assert caller.calls() == [("prefill", set()), ("prefill", {"p1"})]
    # The second one had just said that it is well.
    assert caller.asked_well == [("prefill", {"p1"})]
    assert caller.onlys == [None, "p2"]


def test_decode_that_dies_twice_gives_the_ticket_up() -> None:
    caller = FakeCaller([PrefillAnswer("p1", T1)], [[lost("d1")], [lost("d2")]])

    (killer,) = answers(caller, of("killer"))

    assert is_refused(killer)
    assert caller.aborted == [("p1", T1)]
    assert [call for call, _ in caller.calls()] == ["prefill", "decode", "decode"]


def test_others_are_served_by_whoever_is_free() -> None:
    caller = FakeCaller(
        [lost("p1", "prefill"), lost("p2", "prefill"), PrefillAnswer("p3", T1)], [CHUNKS]
    )

    killer, other = answers(caller, of("killer"), of("fine"))

    assert is_refused(killer)
    assert other == CHUNKS
    assert caller.onlys[2:] == [None, None]


def test_work_that_is_done_clears_a_suspect() -> None:
    caller = FakeCaller(
        [lost("p1", "prefill"), PrefillAnswer("p2", T1), PrefillAnswer("p2", T2)], [CHUNKS, CHUNKS]
    )

    assert answers(caller, of("fine"), of("fine")) == [CHUNKS, CHUNKS]
    assert caller.onlys == [None, "prefill-1", None, None, None]


def test_a_replica_that_was_gone_before_is_nobodys_fault() -> None:
    gone = [lost(name, "prefill", held=False) for name in ("p1", "p2")]
    caller = FakeCaller([*gone, PrefillAnswer("p3", T1)], [CHUNKS])

    assert answers(caller, of("fine")) == [CHUNKS]
    assert caller.asked_well == []


def test_a_replica_that_is_not_well_is_not_tried() -> None:
    caller = FakeCaller([lost("p1", "prefill"), PrefillAnswer("p3", T1)], [CHUNKS])
    caller.wells = [lost("p2", "prefill", held=False), "p3"]

    assert answers(caller, of("fine")) == [CHUNKS]
    assert caller.asked_well == [("prefill", {"p1"}), ("prefill", {"p1", "p2"})]
    assert caller.calls() == [("prefill", set()), ("prefill", {"p1", "p2"}), ("decode", set())]


@pytest.mark.parametrize("decoders", [0, 1])
def test_without_prefill_a_suspect_is_no_risk_for_the_last_decode_replica(decoders: int) -> None:
    caller = FakeCaller([lost("p1", "prefill"), NOBODY], [CHUNKS], decoders=decoders)
    caller.wells = ["p2"]

    (suspect,) = answers(caller, of("killer"))

    assert isinstance(suspect, ServiceUnavailable)
    assert "decode" not in dict(caller.calls())


def test_without_prefill_a_suspect_may_be_the_last_of_one_of_two_decode_replicas() -> None:
    caller = FakeCaller([lost("p1", "prefill")], [[lost("d1")]], decoders=2)
    caller.wells = [NOBODY, "d1"]

    (killer,) = answers(caller, of("killer"))

    assert is_refused(killer)
    assert caller.asked_well == [("prefill", {"p1"}), ("decode", set())]
    assert caller.onlys == [None, "d1"]


@pytest.mark.parametrize("decoders", [0, 1])
def test_without_prefill_decode_serves_who_is_no_suspect(decoders: int) -> None:
    caller = FakeCaller([NOBODY], [CHUNKS], decoders=decoders)

    assert answers(caller, of("fine")) == [CHUNKS]


def test_a_stream_under_which_two_engines_died_ends_with_an_error_event() -> None:
    caller = FakeCaller(
        [PrefillAnswer("p1", T1), PrefillAnswer("p1", T2)],
        [[part("a", 1), lost("d1")], [part("b", 2), lost("d2")]],
    )
    request = GenerationRequest("completions", of("killer").body, sent=Sent())

    ((*_, last),) = answers(caller, request)

    event, done, rest = last.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 500
    assert (done, rest) == ("data: [DONE]", "")
    # Prefill, which was no trouble, is asked like always.
    assert caller.onlys == [None, None, None, "decode-1"]


def test_one_killer_among_several_prompts_refuses_all() -> None:
    caller = FakeCaller(
        [lost("p1", "prefill"), lost("p2", "prefill"), HANG, PrefillAnswer("p3", T1)], [CHUNKS]
    )

    _, several, other = answers(caller, of("killer"), of(["fine", "killer"]), of("fine"))

    assert is_refused(several)
    assert other == CHUNKS


# ---- one at a time -------------------------------------------------------------------------------


class Client:
    """A request under way, and what it got."""

    def __init__(self, coordinator: Coordinator, request: GenerationRequest) -> None:
        self.items: list[Any] = []
        self.task = asyncio.ensure_future(self._take(coordinator, request))

    async def _take(self, coordinator: Coordinator, request: GenerationRequest) -> None:
        self.items.extend(await answer_of(coordinator, request))


async def rounds() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


def test_suspects_are_tried_one_after_the_other() -> None:
    async def main() -> None:
        world, events = World(), list[RouterEvent]()
        coordinator = Coordinator(world, POLICY, None, events.append)
        clients = [Client(coordinator, of(name)) for name in ("a", "b", "killer", "c")]
        await rounds()
        assert len(world.prefills) == 4
        died = world.kill("prefill")
        for call in list(world.prefills):
            call.done.set_exception(lost(died, "prefill"))
        await asyncio.sleep(0.1)

        for name in ("a", "b"):
            (call,) = world.prefills
            assert (call.request.body.prompt, call.only) == (name, world.engine("prefill"))
            call.done.set_result(PrefillAnswer("p", world.offer(1)))
            await rounds()
        (call,) = world.prefills
        assert call.request.body.prompt == "killer"
        call.done.set_exception(lost(world.kill("prefill"), "prefill"))
        await rounds()
        assert is_refused(clients[2].items)

        (call,) = world.prefills
        assert (call.request.body.prompt, call.only) == ("c", world.engine("prefill"))
        call.done.set_result(PrefillAnswer("p", world.offer(1)))
        await rounds()
        # Who passed is nobody's risk at decode.
        assert [decode.only for decode in world.decodes] == [None] * 3
        for client in clients:
            client.task.cancel()
        await rounds()
        assert world.pinned == {}
        assert events.count(RouterEvent.SUSPECT_TRIED) == 4
        assert events.count(RouterEvent.CONDEMNED) == 1
        await coordinator.drain()

    drive(main())


def test_a_client_that_leaves_makes_room_for_the_next_suspect() -> None:
    async def main() -> None:
        world = World()
        coordinator = Coordinator(world, POLICY)
        clients = [Client(coordinator, of(name)) for name in ("a", "b", "c")]
        await rounds()
        died = world.kill("prefill")
        for call in list(world.prefills):
            call.done.set_exception(lost(died, "prefill"))
        await asyncio.sleep(0.1)
        # One of those that wait, and the one that is tried.
        for client in (clients[1], clients[0]):
            client.task.cancel()
            await rounds()

        (call,) = world.prefills
        assert call.request.body.prompt == "c"
        clients[2].task.cancel()
        await rounds()
        assert world.prefills == []
        await coordinator.drain()

    drive(main())


def test_who_is_condemned_while_it_waits_is_not_tried() -> None:
    async def main() -> None:
        world = World()
        coordinator = Coordinator(world, POLICY)
        clients = [Client(coordinator, of("killer")) for _ in range(3)]
        await rounds()
        died = world.kill("prefill")
        for call in list(world.prefills):
            call.done.set_exception(lost(died, "prefill"))
        await asyncio.sleep(0.1)
        (call,) = world.prefills
        call.done.set_exception(lost(world.kill("prefill"), "prefill"))
        await rounds()

        assert all(is_refused(client.items) for client in clients)
        assert world.prefills == []
        await coordinator.drain()

    drive(main())


def test_the_time_in_line_for_a_trial_is_not_taken_for_prefills() -> None:
    async def main() -> None:
        world, admission = World(), Admission(AdmissionPolicy())
        coordinator = Coordinator(world, POLICY, admission)
        clients = [Client(coordinator, of("slow"))]
        await rounds()
        (call,) = world.prefills
        call.done.set_exception(lost(world.kill("prefill"), "prefill"))
        await asyncio.sleep(0.1)
        # Of the same content, and in line behind its trial.
        clients.append(Client(coordinator, of("slow")))
        await asyncio.sleep(0.1)
        for _ in clients:
            (call,) = world.prefills
            call.done.set_result(PrefillAnswer("p", world.offer(1)))
            await rounds()
        assert [decode.ticket is not None for decode in world.decodes] == [True, True]

        now = time.monotonic()
        admission.enter(now).wait(PromptSize(tokens=100), now)
        assert admission.wait_s(now) == 0.0, "nothing is known yet of what prefill costs"
        for client in clients:
            client.task.cancel()
        await rounds()
        await coordinator.drain()

    drive(main())
