"""What a prefill replica's engine is asked for a client's request."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)
from vllm.v1.engine.async_llm import AsyncLLM

from deployments.replicas.engine import BatonEngine
from deployments.streams.generation import GenerationRequest, Method
from tests.support.scripted.tickets import make_ticket

# The engine is imported here, and with it Ray and vLLM.
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated"),  # by OpenAI, in chats
]

PASSED_ON = {"prompt", "sampling_params", "request_id", "lora_request", "priority"}
LEFT_OUT = {
    *("trace_headers", "data_parallel_rank", "session_id"),  # which engine, and who looks on
    *("reasoning_ended", "reasoning_parser_kwargs"),  # when a grammar begins; there is none
    "prompt_text",  # told in an answer, which nobody reads
    "tokenization_kwargs",  # of prompts that are not rendered
}


class Serving:
    """Stands in for vLLM's serving of one method, which renders and finds adapters."""

    default_sampling_params: dict[str, Any] = {}  # noqa: RUF012
    override_max_tokens = None
    model_config = SimpleNamespace(max_model_len=1024)

    def __init__(self) -> None:
        self.rendered: list[Any] = []
        self.default_mm_loras: bool | None = None

    async def render_chat_request(self, body: Any) -> Any:
        self.rendered.append(body)
        return [], [{"type": "token", "prompt_token_ids": [1, 2]}]

    async def render_completion_request(self, body: Any) -> Any:
        self.rendered.append(body)
        return [{"type": "token", "prompt_token_ids": [1, 2]}]

    def _maybe_get_adapters(self, body: Any, supports_default_mm_loras: bool = False) -> str:
        self.default_mm_loras = supports_default_mm_loras
        return "adapter"

    def _extract_prompt_len(self, prompt: Any) -> int:
        return len(prompt["prompt_token_ids"])

    def _get_priority(self, body: Any, raw_request: Any) -> int:
        return int(body.priority)


def prefill(method: Method, **fields: Any) -> tuple[Serving, list[dict[str, Any]], Any]:
    """The serving, the engine's calls, and the request."""
    calls: list[dict[str, Any]] = []

    async def generate(
        prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        calls.append({"prompt": prompt, "sampling_params": sampling_params, **more})
        yield SimpleNamespace(kv_transfer_params=make_ticket().to_params())

    serving = Serving()
    engine: Any = BatonEngine.__new__(BatonEngine)
    engine._oai_serving_chat = engine._oai_serving_completion = serving
    engine._engine_client = SimpleNamespace(
        generate=generate,
        input_processor=SimpleNamespace(
            _validate_params=lambda params, tasks: None,
            _validate_model_inputs=lambda encoder, decoder: None,
        ),
    )
    made: Any = ChatCompletionRequest if method == "chat" else CompletionRequest
    body = made(**fields)
    done = asyncio.run(engine.prefill(GenerationRequest(method, body), "h"))
    assert done == make_ticket()
    return serving, calls, body


def test_each_argument_of_the_engine_is_known() -> None:
    """One that this finds is new in vLLM: does it change what a prompt's blocks hold?"""
    assert set(inspect.signature(AsyncLLM.generate).parameters) - {"self"} == PASSED_ON | LEFT_OUT


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("completions", {"prompt": "Hi", "truncate_prompt_tokens": -1, "max_tokens": 200}),
        ("completions", {"prompt": "Hi", "logprobs": 2, "logprob_token_ids": [50, 60]}),
        ("chat", {"messages": [{"role": "user", "content": "Hi"}], "truncate_prompt_tokens": 1024}),
    ],
)
def test_the_prompt_is_rendered_from_the_request_as_it_came(
    method: Method, fields: dict[str, Any]
) -> None:
    serving, (call,), body = prefill(method, priority=3, n=2, min_tokens=3, **fields)

    assert serving.rendered == [body]
    assert (call["lora_request"], call["priority"]) == ("adapter", 3)
    params = call["sampling_params"]
    assert (params.max_tokens, params.n, params.min_tokens, params.logprobs) == (1, 1, 0, None)
    assert params.extra_args["kv_transfer_params"]["readers"] == 2


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("completions", {"prompt": "Hi"}),
        ("chat", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_the_adapter_is_found_as_decode_finds_it(method: Method, fields: dict[str, Any]) -> None:
    """vLLM has adapters for images and the like that chats get without asking for them."""
    serving, _, _ = prefill(method, **fields)
    assert serving.default_mm_loras is (method == "chat")
