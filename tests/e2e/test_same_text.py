"""The main claim: two replicas give the same text as one engine, and the KV really crossed."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from serve_app.launch.demo_model import resolve_model
from tests.support.load.reference import reference_texts
from tests.support.load.streams import Stream
from tests.support.servers.baton_app import ROOT, BatonApp, write_config
from tests.support.servers.vllm_server import get, metric, post

pytestmark = pytest.mark.timeout(900)

MODEL = "smollm2-135m-instruct"
MAX_MODEL_LEN = 3328
BLOCK = 32
MAX_TOKENS = 24
EDGES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 200, 511, 1024, 1777, 2999, 3000]
PROMPTS = int(os.environ.get("BATON_TEST_PROMPTS", "12"))
"""12 in CI; 50 by hand."""


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    expected: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("demo")
    config = write_config(
        folder,
        model="baton-demo",
        model_id=MODEL,
        engine={"max_model_len": MAX_MODEL_LEN, "kv_cache_memory_bytes": 1 << 30},
    )
    with BatonApp(config, folder / "up.log") as app:
        yield app


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Prompts of English words, each of an exact length in tokens, and what one engine says."""
    model = resolve_model("baton-demo")
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = (ROOT / "LICENSE").read_text().split()
    picker = random.Random(7)
    lengths = EDGES + [picker.randint(1, 3000) for _ in range(PROMPTS - len(EDGES))]
    prompts = []
    for length in lengths[:PROMPTS]:
        ids: list[int] = []
        while len(ids) < length:
            ids = tokenizer(" ".join(picker.choices(words, k=length + 16)))["input_ids"]
        prompts.append(ids[:length])
    texts = reference_texts(
        model,
        prompts,
        max_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        folder=tmp_path_factory.mktemp("reference"),
    )
    return [Case(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


@pytest.fixture
def client(demo: BatonApp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{demo.url}/v1", api_key="none", timeout=300, max_retries=0
    ) as made:
        yield made


def _wait_unpinned(app: BatonApp) -> None:
    deadline = time.monotonic() + 10
    while app.pinned_blocks():
        if time.monotonic() > deadline:
            pytest.fail(f"blocks stayed pinned: {app.status()}")
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_same_text_as_one_engine(
    demo: BatonApp, client: openai.OpenAI, cases: list[Case], stream: bool
) -> None:
    before = demo.totals("decode")

    def ask(case: Case) -> str:
        # A salt of its own keeps the first run's blocks from serving the second.
        answer: Any = client.completions.create(
            model=MODEL,
            prompt=case.prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=stream,
            extra_body={"cache_salt": f"stream-{stream}"},
        )
        if not stream:
            return str(answer.choices[0].text)
        return "".join(chunk.choices[0].text for chunk in answer if chunk.choices)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, cases))
    wrong = {
        len(case.prompt): (text, case.expected)
        for case, text in zip(cases, texts, strict=True)
        if text != case.expected
    }
    assert not wrong

    _wait_unpinned(demo)
    after = demo.totals("decode")
    moved = {name: after[name] - before.get(name, 0) for name in after}
    # A prompt of one token has nothing to hand over: decode computes the last token anyway.
    handed_over = [len(case.prompt) for case in cases if len(case.prompt) > 1]
    assert moved["tokens"] == sum(handed_over)
    assert moved["reader_ok"] == len(handed_over)
    assert moved["recomputed_tokens"] == 0
    blocks = sum(-(-length // BLOCK) for length in handed_over)
    assert moved["bytes"] == blocks * BLOCK * 2 * 22.5 * 1024  # float32 is twice bfloat16
    assert all(worker["loads"] == 0 for worker in demo.status()["decode"])


def test_decode_computed_at_most_one_prompt_token_a_request(
    demo: BatonApp, cases: list[Case]
) -> None:
    """By vLLM's own count, after everything that this module sent so far."""
    name = "ray_vllm_prompt_tokens_by_source_total"
    requests = demo.totals("decode")["reader_ok"] + 2  # and the one-token prompts
    (decode,) = demo.status()["decode"]
    deadline = time.monotonic() + 30
    while True:  # Ray exports metrics every few seconds
        text = get(f"{demo.url}/metrics")[1]
        fetched = metric(text, name, source="external_kv_transfer", ReplicaId=decode["replica_id"])
        if fetched >= demo.totals("decode")["tokens"] or time.monotonic() > deadline:
            break
        time.sleep(1)
    # vLLM takes the last token of a fetched prompt as fetched, although it computes it again.
    assert fetched == demo.totals("decode")["tokens"]
    computed = metric(text, name, source="local_compute", ReplicaId=decode["replica_id"])
    assert computed <= requests
    prefilled = metric(text, name, source="local_compute")
    assert prefilled > 0.9 * fetched, "the label by which the replica is known has changed"


def test_openai_client_multi_turn_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=32, temperature=0
    )
    text = first.choices[0].message.content or ""
    assert "Paris" in text
    assert first.choices[0].finish_reason == "stop"
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And which country is that city in?"},
    ]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=32, temperature=0
    )
    assert "France" in (second.choices[0].message.content or "")
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_openai_client_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colours."}],
        max_tokens=20,
        temperature=0,
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Name three colours."}],
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_models_and_tokenize(demo: BatonApp, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = post(f"{demo.url}/tokenize", {"model": MODEL, "prompt": "San Francisco is a"})
    assert answer["count"] == 4


def test_an_unread_answer_leaves_nothing_pinned(demo: BatonApp, client: openai.OpenAI) -> None:
    """Clients that go away in the middle of a stream."""
    for _ in range(4):
        stream = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=200, temperature=0, stream=True
        )
        next(iter(stream))
        stream.close()
    _wait_unpinned(demo)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
def test_a_client_that_leaves_frees_both_sides(demo: BatonApp, after_s: float) -> None:
    """Whatever phase it leaves in: queued, prefilling, ticket issued, reading, decoding."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": [5 + (int(after_s * 100) * 7 + index) % 900 for index in range(2800)],
            "max_tokens": 300,
            "min_tokens": 300,
            "stream": True,
        }
    )
    before = demo.totals("prefill")
    connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=30)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    time.sleep(after_s)
    connection.close()
    deadline = time.monotonic() + 15
    while True:  # far below the 30 s after which a ticket expires
        busy = _running_requests(demo)
        if not busy and not demo.pinned_blocks():
            break
        if time.monotonic() > deadline:
            pytest.fail(f"{busy} requests run on, {demo.pinned_blocks()} blocks are pinned")
        time.sleep(0.2)
    assert demo.totals("prefill").get("owner_expired", 0) == before.get("owner_expired", 0)


def _running_requests(app: BatonApp) -> int:
    return sum(worker["unfinished_requests"] for side in app.status().values() for worker in side)


def test_logprobs_of_a_long_prompt_do_not_stop_another_stream(demo: BatonApp) -> None:
    """Decode computes such a prompt itself, beside the stream, in pieces."""
    words = (ROOT / "LICENSE").read_text().split()
    asked = {"model": MODEL, "prompt": " ".join(words[:700]), "max_tokens": 1}
    body = {"model": MODEL, "prompt": "The sea is salty", "max_tokens": 1000, "ignore_eos": True}
    with Stream(demo.url, "/v1/completions", body) as stream, ThreadPoolExecutor(1) as pool:
        events = iter(stream)
        next(events)
        came = [time.monotonic()]
        answer = pool.submit(post, f"{demo.url}/v1/completions", {**asked, "prompt_logprobs": 20})
        for _ in events:
            came.append(time.monotonic())
            if answer.done():
                break
        tokens = answer.result()["choices"][0]["prompt_logprobs"]

    assert len(tokens) > 700
    longest = max(after - before for before, after in pairwise(came))
    assert longest < (came[-1] - came[0]) / 2
