"""Which requests have several prompts, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from deployments.callers.http_body import JsonBody
from deployments.streams.generation import GenerationRequest, Sent
from deployments.streams.prompts import samples_of, split


@pytest.mark.parametrize(
    "prompts", [["a", "b"], ["a", "a", "a"], [[1, 2], [3]], [[1], [1]], ["", "b"], [[], [1]]]
)
def test_every_prompt_becomes_a_request_of_its_own(prompts: list[Any]) -> None:
    body = CompletionRequest(model="m", prompt=prompts, seed=5, n=2, temperature=0.5)
    request = GenerationRequest("completions", body, None, Sent(), "mine")

    parts = split(request)

    assert [part.body.prompt for part in parts] == prompts
    for part in parts:
        # Each prompt is sampled as on one server: with the request's own seed.
        assert (part.body.seed, part.body.n, part.body.temperature) == (5, 2, 0.5)
        assert (part.sent, part.client_id) == (Sent(), "mine")
    assert body.prompt == prompts


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2, 3], [[1, 2]]])
def test_one_prompt_stays_as_it_is(prompt: Any) -> None:
    request = GenerationRequest("completions", CompletionRequest(model="m", prompt=prompt))

    assert split(request) == [request]


@pytest.mark.parametrize(
    "prompt", [None, 5, {}, [], ["a", 1], ["a", [1]], [[1], ["a"]], [[1], 2], [None, None]]
)
def test_what_no_engine_knows_is_left_to_it(prompt: Any) -> None:
    request = GenerationRequest("completions", JsonBody({"prompt": prompt}, {}))

    assert split(request) == [request]


def test_a_chat_is_one_prompt() -> None:
    body = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}])
    request = GenerationRequest("chat", body)

    assert split(request) == [request]
    assert split(GenerationRequest("chat", JsonBody({"prompt": ["a", "b"]}, {})))[1:] == []


@pytest.mark.parametrize(
    ("n", "samples"), [(None, 1), (1, 1), (7, 7), (0, 1), (-3, 1), ("2", 1), (True, 1), (2.0, 1)]
)
def test_samples(n: Any, samples: int) -> None:
    assert samples_of(n) == samples
