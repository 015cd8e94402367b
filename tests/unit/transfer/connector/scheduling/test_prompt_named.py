"""A prompt's hash covers whatever vLLM computes its KV from."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request

from transfer.connector.scheduling.ticket_writer import TicketWriter

TOKENS = list(range(40))
WRITER = TicketWriter(
    engine_id="engine",
    tp_size=1,
    block_size=16,
    ttl_s=20.0,
    adapter_fingerprint=lambda adapter: f"weights of {adapter.lora_path}",
)


def request(**prompt: Any) -> Request:
    """vLLM's own, of 40 tokens unless said otherwise."""
    return Request(
        request_id="request",
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        **{"prompt_token_ids": TOKENS, **prompt},
    )


def image(identifier: str = "cat", offset: int = 4, length: int = 8) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


PROMPTS: list[dict[str, Any]] = [
    {},
    {"prompt_token_ids": TOKENS[:-1]},
    {"prompt_token_ids": [*TOKENS[:-1], 7]},
    {"cache_salt": "mine"},
    {"lora_request": LoRARequest("pirate", 1, "/a")},
    {"lora_request": LoRARequest("pirate", 1, "/b")},
    {"mm_features": [image()]},
    {"mm_features": [image("dog")]},
    {"mm_features": [image(offset=5)]},
    {"mm_features": [image(length=9)]},
    {"mm_features": [image("cat"), image("cat", offset=20)]},
]


def test_prompts_with_other_kv_have_other_hashes() -> None:
    hashes = [WRITER.prompt_hash_of(request(**prompt)) for prompt in PROMPTS]

    assert None not in hashes
    assert len(set(hashes)) == len(PROMPTS)
    assert hashes == [WRITER.prompt_hash_of(request(**prompt)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt_token_ids": None},
        {"prompt_token_ids": TOKENS, "prompt_is_token_ids": [True] * 20 + [False] * 20},
    ],
    ids=["alone", "beside tokens"],
)
def test_prompts_given_as_embeddings_have_none(prompt: dict[str, Any]) -> None:
    embeds = torch.zeros(40, 8)

    assert WRITER.prompt_hash_of(request(prompt_embeds=embeds, **prompt)) is None


def test_unknown_adapters_have_none() -> None:
    writer = TicketWriter(
        engine_id="engine", tp_size=1, block_size=16, ttl_s=20.0, adapter_fingerprint=lambda _: None
    )

    assert writer.prompt_hash_of(request(lora_request=LoRARequest("pirate", 1, "/a"))) is None
    assert writer.prompt_hash_of(request()) is not None


def test_all_that_keys_vllms_prefix_cache_is_covered() -> None:
    # vLLM's prefix cache asks the same question: when do equal tokens have other KV?
    # What it begins to look at must be looked at in TicketWriter.prompt_hash_of, too.
    seen = _names_read(
        ast.parse(inspect.getsource(kv_cache_utils)), "generate_block_hash_extra_keys"
    )

    assert seen == {
        *("mm_features", "lora_request", "cache_salt", "prompt_embeds"),
        "_prompt_embeds_per_block_hashes",  # A memo.
    }


def test_all_of_a_request_that_reaches_the_model_is_covered() -> None:
    covered = {"prompt_token_ids", "mm_features", "lora_request", "prompt_embeds"}
    part_of_those = {"prompt_is_token_ids", "prefill_token_ids"}
    not_of_the_prompt = {
        *("req_id", "sampling_params", "pooling_params", "block_ids", "num_computed_tokens")
    }

    names = {field.name for field in dataclasses.fields(NewRequestData)}
    assert names == covered | part_of_those | not_of_the_prompt


def test_the_list_of_what_vllm_reads_would_notice_more() -> None:
    source = """
def top(request, n):
    return _more(request), request.one
def _more(request):
    return request.two
"""

    assert _names_read(ast.parse(source), "top") == {"one", "two"}


def _names_read(module: ast.Module, name: str) -> set[str]:
    """Which attributes of ``request`` a function reads, with what it calls in its module."""
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    names: set[str] = set()
    waiting, done = [name], set()
    while waiting:
        current = waiting.pop()
        if current in done or current not in functions:
            continue
        done.add(current)
        for node in ast.walk(functions[current]):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "request":
                names.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                waiting.append(node.func.id)
    return names
