from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from deployments.errors import Overloaded
from deployments.router.admission import (
    UNBOUNDED,
    Admission,
    AdmissionPolicy,
    Place,
    PrefillCost,
    PromptSize,
    Waiting,
)

TOKENS = PromptSize(tokens=1000)

# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        ("Once upon", PromptSize(characters=9)),
        (["Once", "upon"], PromptSize(characters=8)),
        ([1, 2, 3], PromptSize(tokens=3)),
        ([[1, 2], [3]], PromptSize(tokens=3)),
    ],
)
def test_size_of_prompts(prompt: Any, size: PromptSize) -> None:
    assert PromptSize.of(CompletionRequest(model="m", prompt=prompt)) == size


def test_size_of_a_chat_counts_text_and_not_images() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9999}}
    text = {"type": "text", "text": "x" * 50}
    messages: Any = [
        {"role": "system", "content": "y" * 30},
        {"role": "user", "content": [text, image]},
    ]
    tool: Any = {"type": "function", "function": {"name": "f", "description": "z" * 400}}

    plain = PromptSize.of(ChatCompletionRequest(model="m", messages=messages))
    with_tools = PromptSize.of(ChatCompletionRequest(model="m", messages=messages, tools=[tool]))

    assert 80 <= plain.characters < 200
    assert with_tools.characters - plain.characters >= 400
    assert plain.tokens == 0


# ---- cost ----------------------------------------------------------------------------------------


def test_cost_is_found_from_prompts_of_several_lengths() -> None:
    cost, chance = PrefillCost(), random.Random(1)
    for _ in range(200):
        tokens = chance.randint(10, 4000)
        cost.add(tokens, (0.03 + tokens / 5000) * chance.uniform(0.9, 1.1))

    assert cost.seconds(4000) == pytest.approx(0.83, rel=0.1)
    assert cost.seconds(100) == pytest.approx(0.05, rel=0.5)


def test_prompts_of_one_length_say_nothing_about_longer_ones() -> None:
    cost = PrefillCost()
    for _ in range(20):
        cost.add(100, 0.5)

    assert cost.seconds(100) == cost.seconds(10_000) == pytest.approx(0.5)


def test_cost_follows_a_change() -> None:
    cost = PrefillCost()
    for seconds in (1.0, 0.1):
        for _ in range(300):
            cost.add(100, seconds)

    assert cost.seconds(100) == pytest.approx(0.1, rel=0.05)


def test_nothing_is_known_at_first() -> None:
    assert PrefillCost().seconds(1e6) == 0.0


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e4)), min_size=1, max_size=30))
def test_cost_is_never_negative_and_never_falls_with_length(seen: list[tuple[int, float]]) -> None:
    cost = PrefillCost()
    for tokens, seconds in seen:
        cost.add(tokens, seconds)

    costs = [cost.seconds(tokens) for tokens in (0, 10, 1000, 10**6)]
    assert costs == sorted(costs)
    assert costs[0] >= -1e-6


# ---- who is let in -------------------------------------------------------------------------------


class Prefill:
    """Replicas that compute one prompt after the other at a known speed."""

    def __init__(self, admission: Admission, replicas: int, seconds: float) -> None:
        self.admission = admission
        self.free_at = [0.0] * replicas
        self.seconds = seconds
        self.due: list[tuple[float, int, Waiting]] = []

    def run_until(self, now: float) -> None:
        for at, replica, waiting in sorted(self.due, key=lambda item: item[0]):
            if at <= now:
                waiting.prefilled(f"p{replica}", 1000, at)
                self.due.remove((at, replica, waiting))

    def arrive(self, now: float) -> float:
        """A request comes; returns how long it really waits."""
        self.run_until(now)
        waiting = self.admission.enter(now).wait(TOKENS, now)
        replica = min(range(len(self.free_at)), key=self.free_at.__getitem__)
        wait_s = max(0.0, self.free_at[replica] - now)
        self.free_at[replica] = max(now, self.free_at[replica]) + self.seconds
        self.due.append((self.free_at[replica], replica, waiting))
        return wait_s


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_estimated_wait_is_about_the_real_one(replicas: int) -> None:
    admission = Admission(UNBOUNDED)
    prefill = Prefill(admission, replicas, seconds=0.5)
    chance, now = random.Random(replicas), 0.0
    for _ in range(60):
        now += chance.expovariate(replicas / 0.5)
        prefill.arrive(now)
    real = 0.0
    for _ in range(20 * replicas):
        estimate = admission.wait_s(now)
        real = prefill.arrive(now)
        if real > 3.0:
            assert estimate == pytest.approx(real, rel=0.35)
    assert real > 5.0


def test_request_that_would_wait_too_long_is_told_when_to_come_again() -> None:
    admission = Admission(AdmissionPolicy(max_prefill_wait_s=5.0))
    prefill = Prefill(admission, 1, seconds=1.0)
    for now in range(0, 20, 2):
        prefill.arrive(float(now))
    prefill.run_until(20.0)
    for _ in range(6):
        prefill.arrive(20.0)
    with pytest.raises(Overloaded, match="prefill is busy for 6 s") as refused:
        prefill.arrive(20.0)
    assert refused.value.retry_after_s == 1

    prefill.run_until(25.0)
    prefill.arrive(25.0)


def test_long_prompt_is_let_in_when_nothing_is_before_it() -> None:
    admission = Admission(AdmissionPolicy(max_prefill_wait_s=1.0))
    for tokens in (100, 1000):
        place = admission.enter(0.0)
        place.wait(PromptSize(tokens=tokens), 0.0).prefilled("p1", tokens, tokens / 100)
        place.leave()

    admission.enter(100.0).wait(PromptSize(tokens=10**6), 100.0)

    with pytest.raises(Overloaded):
        admission.enter(100.0)


def test_number_of_requests_is_bounded_until_they_end() -> None:
    admission = Admission(AdmissionPolicy(max_requests=2))
    first = admission.enter(0.0)
    second = admission.enter(0.0, prefill=False)
    first.wait(TOKENS, 0.0).prefilled("p1", 1000, 1.0)
    with pytest.raises(Overloaded, match="2 requests"):
        admission.enter(1.0)

    second.leave()
    second.leave()

    admission.enter(2.0)
    with pytest.raises(Overloaded):
        admission.enter(2.0, prefill=False)


def test_request_with_several_prompts_counts_once_and_each_prompt_waits() -> None:
    admission = Admission(AdmissionPolicy(max_requests=2, max_prefill_wait_s=5.0))
    first = admission.enter(0.0)
    first.wait(TOKENS, 0.0).prefilled("p1", 1000, 2.0)
    waiting = [first.wait(TOKENS, 2.0) for _ in range(3)]
    assert admission.wait_s(2.0) == pytest.approx(6.0)
    with pytest.raises(Overloaded, match="prefill is busy"):
        admission.enter(2.0)

    waiting[0].not_prefilled(2.0)

    admission.enter(2.0)


def test_length_of_text_is_learned() -> None:
    admission = Admission(UNBOUNDED)
    for _ in range(200):
        place = admission.enter(0.0)
        place.wait(PromptSize(characters=300), 0.0).prefilled("p1", 200, 0.0)
        place.leave()

    assert admission.tokens(PromptSize(characters=3000)) == pytest.approx(2000, rel=0.1)
    assert admission.tokens(PromptSize(characters=300, tokens=7)) == pytest.approx(207, rel=0.1)


def test_disturbed_prefill_says_nothing() -> None:
    admission = Admission(UNBOUNDED)
    place = admission.enter(0.0)
    waiting = place.wait(TOKENS, 0.0)
    waiting.not_prefilled(500.0)
    waiting.prefilled("p2", 1000, 501.0)
    place.leave()

    admission.enter(503.0).wait(TOKENS, 503.0)
    assert admission.wait_s(503.0) == 0.0


class AnyTraffic(RuleBasedStateMachine):
    """Requests come, are prefilled or not, and leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(AdmissionPolicy(max_requests=4, max_prefill_wait_s=10.0))
        self.now = 0.0
        self.here: list[Place] = []
        self.waiting: list[Waiting] = []

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=st.lists(st.integers(1, 10**6), max_size=3))
    def comes(self, tokens: list[int]) -> None:
        full = len(self.here) >= 4
        long = bool(tokens) and self.admission.wait_s(self.now) > 10.0
        if full or long:
            with pytest.raises(Overloaded):
                self.admission.enter(self.now, prefill=bool(tokens))
            return
        place = self.admission.enter(self.now, prefill=bool(tokens))
        self.here.append(place)
        self.waiting += [place.wait(PromptSize(tokens=count), self.now) for count in tokens]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), replica=st.sampled_from("abc"), tokens=st.integers(0, 10**6))
    def prefilled(self, data: st.DataObject, replica: str, tokens: int) -> None:
        waiting = data.draw(st.sampled_from(self.waiting))
        waiting.prefilled(replica, tokens, self.now)
        self.waiting.remove(waiting)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def disturbed(self, data: st.DataObject) -> None:
        waiting = data.draw(st.sampled_from(self.waiting))
        waiting.not_prefilled(self.now)
        waiting.not_prefilled(self.now)
        self.waiting.remove(waiting)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.here))
        place.leave()
        place.leave()
        self.here.remove(place)

    @invariant()
    def never_stuck(self) -> None:
        """Whoever waits for nobody waits for no time."""
        wait_s = self.admission.wait_s(self.now)
        assert wait_s >= 0.0
        if not self.waiting:
            assert wait_s == 0.0


AnyTraffic.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase
