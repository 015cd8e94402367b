"""Which requests may be what kills engines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from deployments.callers.http_body import JsonBody
from deployments.router.suspects import REMEMBERED_S, TRIAL_S, Case, Standing, Suspects
from deployments.streams.generation import GenerationRequest

BEGAN = 50.0
"""Before anything died."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def suspects(clock: Clock) -> Suspects:
    return Suspects(clock)


def case(prompt: str = "Once", **fields: Any) -> Case:
    body = CompletionRequest(model="m", prompt=prompt, **fields)
    return Case(GenerationRequest("completions", body))


def plain_case(prompt: str) -> Case:
    """As of the proxy, whose bodies are made in no time: for tests with thousands."""
    return Case(GenerationRequest("completions", JsonBody({"model": "m", "prompt": prompt}, {})))


KILLER = plain_case("killer").content


# ---- what they are known by ----------------------------------------------------------------------


def test_a_request_is_known_by_what_is_computed_for_it() -> None:
    one = case()

    assert one.content == case().content
    assert one.content == case(request_id="r2", user="me", stream=True).content
    assert one.content != case("Twice").content
    assert one.content != case(temperature=0.5).content


def test_chats_and_bodies_of_the_proxy_have_contents_too() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    chat = ChatCompletionRequest(model="m", messages=messages)
    fields = {"model": "m", "messages": messages}

    contents = {
        Case(GenerationRequest("chat", body)).content
        for body in (
            chat,
            ChatCompletionRequest(model="m", messages=messages),
            JsonBody(fields, {}),
            JsonBody({"request_id": "r", "user": "u", **fields}, {"Authorization": "x"}),
        )
    }

    assert len(contents) == 2


# ---- deaths --------------------------------------------------------------------------------------


def test_two_deaths_condemn_and_one_does_not(suspects: Suspects) -> None:
    one = case()
    assert suspects.standing(one) is Standing.CLEAR

    assert suspects.died(one, "prefill", "p1", began=BEGAN) is Standing.SUSPECT
    assert suspects.died(one, "prefill", "p2", began=BEGAN) is Standing.CONDEMNED

    assert suspects.standing(case()) is Standing.CONDEMNED
    assert suspects.standing(case("Twice")) is Standing.CLEAR


def test_deaths_on_both_sides_count_together(suspects: Suspects) -> None:
    suspects.died(case(), "decode", "d1", began=BEGAN)

    assert suspects.died(case(), "prefill", "p1", began=BEGAN) is Standing.CONDEMNED


def test_one_death_counts_once_however_many_had_the_same_content(suspects: Suspects) -> None:
    for _ in range(3):
        assert suspects.died(case(), "decode", "d1", began=BEGAN) is Standing.SUSPECT


def test_a_server_that_came_back_under_its_name_can_die_again(
    suspects: Suspects, clock: Clock
) -> None:
    suspects.died(case(), "decode", "http://d1", began=BEGAN)
    clock.now += 30.0
    # An answer that was on its way is no sign of life.
    suspects.alive("http://d1", BEGAN)
    assert suspects.died(case(), "decode", "http://d1", began=BEGAN) is Standing.SUSPECT

    suspects.alive("http://d1", clock.now)

    assert suspects.died(case(), "decode", "http://d1", began=clock.now) is Standing.CONDEMNED


def test_who_comes_to_a_dead_engine_is_not_to_blame(suspects: Suspects, clock: Clock) -> None:
    suspects.died(case("killer"), "prefill", "p1", began=BEGAN)
    clock.now += 1.0

    assert suspects.died(case(), "prefill", "p1", began=clock.now) is Standing.CLEAR
    assert suspects.died(case(), "prefill", "p1", began=BEGAN) is Standing.SUSPECT


def test_deaths_are_forgotten(suspects: Suspects, clock: Clock) -> None:
    suspects.died(case(), "prefill", "p1", began=BEGAN)
    suspects.died(case(), "prefill", "p2", began=BEGAN)
    clock.now += REMEMBERED_S - 1.0
    assert suspects.standing(case()) is Standing.CONDEMNED

    clock.now += 1.0

    assert suspects.standing(case()) is Standing.CLEAR
    assert suspects.died(case(), "prefill", "p3", began=BEGAN) is Standing.SUSPECT


def test_memory_is_bounded(suspects: Suspects) -> None:
    for number in range(5000):
        suspects.died(plain_case(f"prompt {number}"), "prefill", f"p{number}", began=BEGAN)

    assert suspects.standing(plain_case("prompt 0")) is Standing.CLEAR
    assert suspects.standing(plain_case("prompt 4999")) is Standing.SUSPECT


# ---- trials --------------------------------------------------------------------------------------


def test_one_suspect_at_a_time_is_tried_on_an_engine(suspects: Suspects, clock: Clock) -> None:
    one, other = case(), case()

    assert suspects.begin_trial(one, "decode", "d1")
    assert not suspects.begin_trial(other, "decode", "d1")
    assert suspects.begin_trial(other, "decode", "d2")

    assert suspects.end_trial(one, "decode")
    assert not suspects.end_trial(one, "decode")
    assert suspects.begin_trial(case(), "decode", "d1")
    clock.now += TRIAL_S
    assert suspects.begin_trial(case(), "decode", "d2"), (
        "a trial that takes for ever keeps nobody away"
    )


def test_who_answered_already_is_not_blamed_for_anothers_trial(suspects: Suspects) -> None:
    killer, answering, waiting = case("killer"), case("answering"), case("waiting")
    suspects.died(killer, "decode", "d1", began=BEGAN)
    suspects.died(answering, "decode", "d1", began=BEGAN)
    assert suspects.begin_trial(answering, "decode", "d2")
    suspects.end_trial(answering, "decode")
    assert suspects.begin_trial(killer, "decode", "d2")

    assert suspects.died(answering, "decode", "d2", began=BEGAN, answering=True) is Standing.SUSPECT
    assert suspects.died(waiting, "decode", "d2", began=BEGAN) is Standing.SUSPECT
    assert suspects.died(killer, "decode", "d2", began=BEGAN) is Standing.CONDEMNED
    suspects.end_trial(killer, "decode")
    # Reports that come when the trial is over are of the same death.
    assert suspects.died(answering, "decode", "d2", began=BEGAN, answering=True) is Standing.SUSPECT


def test_a_death_in_several_trials_is_nobodys_alone(suspects: Suspects, clock: Clock) -> None:
    killer, other, answering, clear = (
        case(name) for name in ("killer", "other", "answering", "clear")
    )
    for one in (killer, other, answering):
        suspects.died(one, "prefill", "p1", began=BEGAN)
    assert suspects.begin_trial(killer, "prefill", "p2")
    clock.now += TRIAL_S
    assert suspects.begin_trial(other, "prefill", "p2")

    assert suspects.died(other, "prefill", "p2", began=BEGAN) is Standing.SUSPECT
    suspects.end_trial(other, "prefill")
    assert suspects.died(killer, "prefill", "p2", began=BEGAN) is Standing.SUSPECT
    suspects.end_trial(killer, "prefill")
    # Neither is anybody else cleared or condemned by it.
    for one in (answering, clear):
        assert suspects.died(one, "prefill", "p2", began=BEGAN, answering=True) is Standing.SUSPECT

    assert suspects.begin_trial(killer, "prefill", "p3")
    assert suspects.died(killer, "prefill", "p3", began=BEGAN) is Standing.CONDEMNED


def test_who_is_left_of_several_trials_is_blamed(suspects: Suspects, clock: Clock) -> None:
    killer, slow = case("killer"), case("slow")
    for one in (killer, slow):
        suspects.died(one, "prefill", "p1", began=BEGAN)
    assert suspects.begin_trial(slow, "prefill", "p2")
    clock.now += TRIAL_S
    assert suspects.begin_trial(killer, "prefill", "p2")
    suspects.end_trial(slow, "prefill")

    assert suspects.died(killer, "prefill", "p2", began=BEGAN) is Standing.CONDEMNED


def test_a_trial_lasts_from_when_the_request_is_sent(suspects: Suspects, clock: Clock) -> None:
    one, other = case("one"), case("other")
    assert suspects.begin_trial(one, "decode", "d1")
    clock.now += TRIAL_S - 1.0

    assert suspects.resume_trial(one, "decode") == "d1"
    clock.now += TRIAL_S - 1.0
    assert not suspects.begin_trial(other, "decode", "d1")
    clock.now += 1.0
    assert suspects.begin_trial(other, "decode", "d1")
    assert suspects.resume_trial(one, "prefill") is None


def test_who_answered_is_blamed_where_nobody_was_tried(suspects: Suspects) -> None:
    suspects.died(case(), "decode", "d1", began=BEGAN)

    assert suspects.died(case(), "decode", "d2", began=BEGAN, answering=True) is Standing.CONDEMNED


# ---- what clears ---------------------------------------------------------------------------------


def test_work_that_is_done_clears_its_side(suspects: Suspects) -> None:
    suspects.died(case(), "prefill", "p1", began=BEGAN)
    suspects.passed(case(), "prefill")
    assert suspects.standing(case()) is Standing.CLEAR

    suspects.died(case(), "decode", "d1", began=BEGAN)
    suspects.passed(case(), "prefill")
    assert suspects.standing(case()) is Standing.SUSPECT
    suspects.passed(case(), "decode")
    assert suspects.standing(case()) is Standing.CLEAR


def test_decode_that_computed_all_clears_of_all(suspects: Suspects) -> None:
    suspects.died(case(), "prefill", "p1", began=BEGAN)

    suspects.passed(case(), "decode")

    assert suspects.standing(case()) is Standing.CLEAR


def test_the_side_that_is_at_risk(suspects: Suspects) -> None:
    one = case()
    assert not suspects.is_risk(one, "prefill")
    assert not suspects.is_risk(one, "decode")

    suspects.died(one, "decode", "d1", began=BEGAN)
    assert not suspects.is_risk(one, "prefill")
    assert suspects.is_risk(one, "decode")

    suspects.passed(one, "decode")
    suspects.died(one, "prefill", "p1", began=BEGAN)
    assert suspects.is_risk(one, "prefill")
    assert suspects.is_risk(one, "decode")


# ---- a killer among others -----------------------------------------------------------------------


class OneKiller(RuleBasedStateMachine):
    """Engines with requests; one content ends whatever engine computes it, others end none."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.suspects = Suspects(self.clock)
        self.engines: dict[str, list[tuple[Case, bool]]] = {"e0": [], "e1": [], "e2": []}
        self.waiting: list[Case] = []
        self.starts = 3
        self.killed = 0
        self.condemned: list[Case] = []

    def pick(self, data: st.DataObject, items: list[Any]) -> Any:
        return items[data.draw(st.integers(0, len(items) - 1))]

    @precondition(lambda self: len(self.waiting) < 6)
    @rule(killer=st.booleans(), number=st.integers(0, 3))
    def comes(self, killer: bool, number: int) -> None:
        one = plain_case("killer" if killer else f"prompt {number}")
        if self.suspects.standing(one) is not Standing.CONDEMNED:
            self.waiting.append(one)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def begins(self, data: st.DataObject) -> None:
        one = self.pick(data, self.waiting)
        engine = self.pick(data, sorted(self.engines))
        if self.suspects.standing(one) is Standing.CONDEMNED:
            self.waiting.remove(one)
            self.condemned.append(one)
            return
        if self.suspects.is_risk(one, "decode") and not self.suspects.begin_trial(
            one, "decode", engine
        ):
            return
        self.waiting.remove(one)
        self.engines[engine].append((one, False))
        if self.kills(one) and not self.is_slow(one):
            # Nothing comes between: whoever is sent there next finds another engine.
            self.ends(data, engine)

    def ends(self, data: st.DataObject, engine: str) -> None:
        self.killed += 1
        running = self.engines.pop(engine)
        self.engines[f"e{self.starts}"] = []
        self.starts += 1
        for lost, answering in data.draw(st.permutations(running)):
            standing = self.suspects.died(lost, "decode", engine, began=BEGAN, answering=answering)
            self.suspects.end_trial(lost, "decode")
            (self.condemned if standing is Standing.CONDEMNED else self.waiting).append(lost)

    def is_slow(self, one: Case) -> bool:
        """Whether it works for a while before its engine ends."""
        return False

    @precondition(lambda self: any(self.engines.values()))
    @rule(data=st.data(), ends=st.booleans())
    def goes_on(self, data: st.DataObject, ends: bool) -> None:
        engine = self.pick(data, sorted(name for name, has in self.engines.items() if has))
        at = data.draw(st.integers(0, len(self.engines[engine]) - 1))
        if self.kills(self.engines[engine][at][0]):
            self.ends(data, engine)
            return
        one, _ = self.engines[engine].pop(at)
        self.suspects.end_trial(one, "decode")
        if ends:
            self.suspects.passed(one, "decode")
        else:
            self.engines[engine].append((one, True))

    @rule(seconds=st.sampled_from([1.0, TRIAL_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def kills(self, one: Case) -> bool:
        return one.content == KILLER

    @invariant()
    def few_engines_end(self) -> None:
        assert self.killed <= 2 + self.clock.now // REMEMBERED_S * 2

    @invariant()
    def nobody_else_is_condemned(self) -> None:
        assert all(self.kills(one) for one in self.condemned)


class SlowKiller(OneKiller):
    """On trial, it works longer than a trial keeps others away: it costs more engines."""

    def __init__(self) -> None:
        super().__init__()
        del self.engines["e2"]
        for name in ("killer", "prompt 0"):
            one = plain_case(name)
            self.suspects.died(one, "decode", "the first", began=BEGAN)
            self.waiting.append(one)

    def is_slow(self, one: Case) -> bool:
        return self.suspects.resume_trial(one, "decode") is not None

    @invariant()
    def few_engines_end(self) -> None:
        pass


EFFORT = settings(max_examples=100, stateful_step_count=30, deadline=None)
OneKiller.TestCase.settings = SlowKiller.TestCase.settings = EFFORT
TestOneKiller = OneKiller.TestCase
TestSlowKiller = SlowKiller.TestCase
