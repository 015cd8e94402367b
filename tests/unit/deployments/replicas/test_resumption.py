from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from deployments.replicas.resumption import SENT_TOKEN_IDS, resuming, take_sent

PROMPT: dict[str, Any] = {"type": "token", "prompt_token_ids": [40, 41, 42]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


class FakeEngine:
    """An engine whose answer to the prompt is known, some tokens to each output."""

    def __init__(self, answer: list[int], sizes: list[int], end: str = "length") -> None:
        self.answer = answer
        self.sizes = sizes
        self.end = end
        self.calls: list[tuple[list[int], SamplingParams]] = []
        self.open = 0

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **more: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.calls.append((prompt["prompt_token_ids"], params))
        begin = len(prompt["prompt_token_ids"]) - len(PROMPT["prompt_token_ids"])
        assert prompt["prompt_token_ids"] == [*PROMPT["prompt_token_ids"], *self.answer[:begin]]
        self.open += 1
        try:
            left = self.answer[begin:][: params.max_tokens]
            sizes = iter(self.sizes * len(left))
            while left:
                size = next(sizes)
                now, left = left[:size], left[size:]
                yield made(now, None if left else self.end, prompt["prompt_token_ids"])
        finally:
            self.open -= 1


def made(token_ids: list[int], end: str | None, prompt: list[int] | None = None) -> RequestOutput:
    completion = CompletionOutput(0, "", token_ids, None, None, finish_reason=end)
    return RequestOutput("r", None, prompt, None, [completion], finished=end is not None)


def params(**values: Any) -> SamplingParams:
    return SamplingParams(output_kind=RequestOutputKind.DELTA, **values)


def whole_answer(
    tokenizer: Any, answer: list[int], values: dict[str, Any], end: str
) -> tuple[str, int, str, Any]:
    """Text, tokens, reason and stop string of vLLM's own detokenizer, token by token."""
    request: Any = SimpleNamespace(
        request_id="r", sampling_params=params(**values), prompt_embeds=None, **PROMPT
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    text = ""
    for number, token_id in enumerate(answer, 1):
        last = number == len(answer)
        stop = detokenizer.update([token_id], last and end == "stop")
        text += detokenizer.get_next_output_text(last or stop is not None, True)
        if stop is not None:
            return text, number, "stop", stop
    return text, len(answer), end, None


Resumed = tuple[str, list[int], str | None, Any, set[Any]]
"""Text, tokens, reason, stop string, and the prompts that the outputs named."""


def resumed(tokenizer: Any, engine: FakeEngine, sent: int, values: dict[str, Any]) -> Resumed:
    async def main() -> Resumed:
        generate = resuming(engine.generate, lambda: tokenizer)
        transfer = {"kv_transfer_params": {SENT_TOKEN_IDS: engine.answer[:sent]}}
        given = params(extra_args=transfer, **values)
        text = ""
        token_ids: list[int] = []
        prompts: set[Any] = set()
        async for output in generate(PROMPT, given, "r"):
            (completion,) = output.outputs
            text += completion.text
            token_ids += completion.token_ids
            prompts.add(tuple(output.prompt_token_ids or ()))
        return text, token_ids, completion.finish_reason, completion.stop_reason, prompts

    result = asyncio.run(main())
    assert engine.open == 0
    return result


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_resumed_answer_is_the_undisturbed_one(tokenizer: Any, data: st.DataObject) -> None:
    """Cut anywhere: within a character of several bytes, within a stop string, at special tokens.
    However many tokens come at once, as they do when their consumer lags.

    The tiny vocabulary is bytes, so most random answers hold broken and split UTF-8.
    """
    answer = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=2, max_size=24))
    text = tokenizer.decode(answer)
    piece = st.integers(0, max(0, len(text) - 3)).map(lambda at: text[at : at + 3])
    values: dict[str, Any] = {
        "max_tokens": len(answer),
        "stop": data.draw(st.lists(piece.filter(bool), max_size=2)),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "min_tokens": data.draw(st.integers(0, len(answer))),
        "skip_special_tokens": data.draw(st.booleans()),
    }
    end = data.draw(st.sampled_from(["length", "stop"]))
    expected = whole_answer(tokenizer, answer, values, end)
    # The client has fewer tokens than there were before the end.
    sent = data.draw(st.integers(1, max(1, expected[1] - 1)))
    if expected[1] <= sent:
        return
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=24))
    engine = FakeEngine(answer, sizes, end)

    told, token_ids, reason, stop, prompts = resumed(tokenizer, engine, sent, values)

    assert (told, len(token_ids), reason, stop) == expected
    assert token_ids == answer[: expected[1]]
    assert prompts == {tuple(PROMPT["prompt_token_ids"])}


def test_engine_gets_the_rest_of_the_budget_and_makes_no_text(tokenizer: Any) -> None:
    engine = FakeEngine(list(range(50, 60)), [3])
    values = {"max_tokens": 10, "min_tokens": 6, "stop": ["never there"], "temperature": 0.0}

    resumed(tokenizer, engine, 4, values)

    ((prompt, given),) = engine.calls
    assert prompt == [40, 41, 42, 50, 51, 52, 53]
    assert (given.max_tokens, given.min_tokens) == (6, 2)
    assert (given.detokenize, given.stop) == (False, [])
    assert given.extra_args == {"kv_transfer_params": None}


def test_nothing_left_to_generate_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="none is left"):
        resumed(tokenizer, FakeEngine([50, 51], [1]), 2, {"max_tokens": 2})


def test_other_requests_are_the_engines_own(tokenizer: Any) -> None:
    engine = FakeEngine([50, 51], [1])
    ticket = {"kv_transfer_params": {"handoff_id": "h1"}}
    given = params(max_tokens=2, extra_args=ticket)

    async def main() -> list[RequestOutput]:
        return [o async for o in resuming(engine.generate, lambda: None)(PROMPT, given, "r")]

    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == [[50], [51]]
    assert engine.calls[0][1] is given
    assert given.extra_args == ticket


def test_tokens_are_taken_out_and_the_ticket_stays() -> None:
    given = params(extra_args={"kv_transfer_params": {"handoff_id": "h1", SENT_TOKEN_IDS: [1, 2]}})

    assert take_sent(given) == [1, 2]
    assert given.extra_args == {"kv_transfer_params": {"handoff_id": "h1"}}
    assert take_sent(given) == []
