"""What comes of several prompts is what vLLM's own server makes of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from deployments.errors import AnswerUnreadable
from deployments.streams.framing import DONE
from deployments.streams.merging import MergedStream, merged_answer
from deployments.streams.prompts import samples_of

CREATED = 1_700_000_000


def serving(*, cached_tokens: bool = False) -> Any:
    """vLLM's serving of completions, without an engine."""
    made = object.__new__(OpenAIServingCompletion)
    made.enable_prompt_tokens_details = cached_tokens
    made.enable_per_request_metrics = False
    made.enable_force_include_usage = False
    made.system_fingerprint = "vllm-test"
    return made


def output(
    prompt: int, texts: list[str], *, finished: bool = True, prompt_tokens: int | None = 3
) -> RequestOutput:
    """What the engine says of one prompt: a text for each sample."""
    return RequestOutput(
        request_id=f"r-{prompt}",
        prompt="p",
        prompt_token_ids=None if prompt_tokens is None else list(range(prompt_tokens + prompt)),
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=index,
                text=text,
                token_ids=[1] * len(text),
                cumulative_logprob=None,
                logprobs=None,
                finish_reason="stop" if finished else None,
            )
            for index, text in enumerate(texts)
        ],
        finished=finished,
        num_cached_tokens=10 + prompt,
    )


def request(**more: Any) -> Any:
    return CompletionRequest(model="m", prompt="x", max_tokens=99, **more)


def whole(made: Any, results: list[RequestOutput], asked: Any, created: int = CREATED) -> bytes:
    response = made.request_output_to_completion_response(
        results, asked, "cmpl-1", created, "m", None, RequestResponseMetadata(request_id="cmpl-1")
    )
    return str(response.model_dump_json()).encode()


def streamed(
    made: Any, steps: list[tuple[int, RequestOutput]], asked: Any, prompts: int
) -> list[str]:
    async def results() -> AsyncIterator[tuple[int, RequestOutput]]:
        for step in steps:
            yield step

    async def main() -> list[str]:
        events = made.completion_stream_generator(
            *(asked, [{}] * prompts, results(), "cmpl-1", CREATED, "m"),
            num_prompts=prompts,
            tokenizer=None,
            request_metadata=RequestResponseMetadata(request_id="cmpl-1"),
        )
        return [event async for event in events]

    return asyncio.run(main())


texts = st.text(alphabet='abé\n"', min_size=1, max_size=3)


@given(
    st.integers(1, 3).flatmap(
        lambda samples: st.lists(
            st.lists(texts, min_size=samples, max_size=samples), min_size=2, max_size=5
        )
    ),
    st.booleans(),
)
def test_whole_answers_are_put_together_as_by_one_server(
    prompts: list[list[str]], cached_tokens: bool
) -> None:
    made = serving(cached_tokens=cached_tokens)
    asked = request(n=len(prompts[0]))
    results = [output(number, one) for number, one in enumerate(prompts)]

    # The servers answer at different times; the client gets one.
    parts = [whole(made, [one], asked, CREATED + number) for number, one in enumerate(results)]

    assert json.loads(merged_answer(parts)) == json.loads(whole(made, results, asked))


@given(
    st.lists(
        st.lists(st.lists(texts, min_size=1, max_size=4), min_size=2, max_size=2),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from([None, {"include_usage": True}, {"include_usage": True} | {"x": 1}]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_streams_are_put_together_as_by_one_server(
    prompts: list[list[list[str]]], options: Any, cached_tokens: bool, chance: random.Random
) -> None:
    if options and options.pop("x", None):
        options["continuous_usage_stats"] = True
    made = serving(cached_tokens=cached_tokens)
    asked = request(n=2, stream=True, stream_options=options)
    # Every prompt's pieces in order, the prompts in any.
    order = [number for number, pieces in enumerate(prompts) for _ in range(_longest(pieces))]
    chance.shuffle(order)
    at = [0] * len(prompts)
    steps: list[tuple[int, RequestOutput]] = []
    for number in order:
        pieces, step = prompts[number], at[number]
        now = [sample[step] if step < len(sample) else "" for sample in pieces]
        steps.append((number, output(number, now, finished=step == _longest(pieces) - 1)))
        at[number] += 1

    expected = streamed(made, steps, asked, len(prompts))

    parts = [
        streamed(made, [(0, one) for which, one in steps if which == number], asked, 1)
        for number in range(len(prompts))
    ]
    assert _merged(parts, [number for number, _ in steps], asked) == _parsed(expected)


def _longest(pieces: list[list[str]]) -> int:
    return max(len(sample) for sample in pieces)


def _merged(parts: list[list[str]], order: list[int], asked: Any) -> list[Any]:
    """The parts' events as the engine's outputs came, what ends a part right behind its last."""
    merged = MergedStream(samples_of(asked.n))
    left = {number: order.count(number) for number in set(order)}
    told = []
    for number in order:
        left[number] -= 1
        count = len(parts[number]) if not left[number] else asked.n
        told.append(merged.take(number, "".join(parts[number][:count])))
        del parts[number][:count]
    return _parsed([*told, merged.end()])


def _parsed(events: list[str]) -> list[Any]:
    text = "".join(events)
    assert text.endswith(DONE)
    assert text.count(DONE) == 1
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def test_one_stream_has_one_time_of_creation() -> None:
    merged = MergedStream(1)
    first = merged.take(1, 'data: {"id":"a","created":5,"choices":[{"index":0}]}\n\n')
    second = merged.take(0, 'data: {"id":"a","created":6,"choices":[{"index":0}]}\n\n')

    assert first == 'data: {"id":"a","created":5,"choices":[{"index":1}]}\n\n'
    assert second == 'data: {"id":"a","created":5,"choices":[{"index":0}]}\n\n'
    assert merged.end() == DONE


def test_an_error_in_a_stream_is_the_last_thing_in_it() -> None:
    merged = MergedStream(1)
    error = 'data: {"error":{"message":"no"}}\n\n'

    assert merged.take(0, error + DONE) == error
    assert merged.failed
    assert merged.take(1, 'data: {"choices":[{"index":0}]}\n\n') == ""
    assert merged.end() == DONE


@pytest.mark.parametrize(
    "answer",
    [b"{", b"[]", b"5", b"{}", b'{"choices": 5}', b'{"choices": [5]}', b"[" * 100_000],
    ids=["broken", "list", "number", "empty", "no list", "no choices", "too deep"],
)
def test_what_is_no_completion_cannot_be_read(answer: bytes) -> None:
    with pytest.raises(AnswerUnreadable):
        merged_answer([answer])
    with pytest.raises(AnswerUnreadable):
        MergedStream(1).take(0, f"data: {answer.decode()}\n\n")
