"""Requests with several prompts, on an application whose prefill has room for few of them."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve_app.launch.parent_death import EXIT_INTERRUPTED
from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.vllm_server import VllmServer, post

pytestmark = pytest.mark.timeout(600)

MODEL = "tiny"
PATH = "/v1/completions"
BLOCK = 32
POOL_BLOCKS = 91
"""Of prefill: 2,912 tokens."""
PROMPTS = [[3 + (number * 17 + at * at) % 190 for at in range(260)] for number in range(16)]
FEW_SECONDS = 20.0
"""The machine may be busy with other things; tickets expire after 30 s."""
STOP_S = 10.0
"""What is still there after 3 s is killed; the rest is for a busy machine."""


@pytest.fixture(scope="module")
def one_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("one-engine") / "server.log"
    arguments = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", f"{BLOCK}"]
    with VllmServer(tiny_model, arguments, log) as server:
        yield server


@pytest.fixture(scope="module")
def app(
    tiny_model: Path, one_engine: VllmServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("many-prompts")
    config = write_config(
        folder,
        model=str(tiny_model),
        model_id=MODEL,
        # Without prefix caches a prompt that was read once is read again.
        engine={"block_size": BLOCK, "enable_prefix_caching": False},
        prefill={"replicas": 1, "engine": {"num_gpu_blocks_override": POOL_BLOCKS}},
    )
    with BatonApp(config, folder / "up.log") as running:
        one_engine.wait()
        yield running


@pytest.fixture(autouse=True)
def nothing_waits_or_is_left(app: BatonApp) -> Iterator[None]:
    """No prompt is computed twice, and nothing ends by expiry."""
    before = app.totals("decode").get("recomputed_tokens", 0)
    yield
    if app.process.poll() is not None:
        return
    deadline = time.monotonic() + 3.0
    while app.pinned_blocks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert app.pinned_blocks() == 0
    assert app.totals("prefill").get("owner_expired", 0) == 0
    assert app.totals("decode").get("recomputed_tokens", 0) == before


def request(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}


def told(answer: dict[str, Any]) -> Any:
    """What an answer says, but for what differs from one answer to the next."""
    return {name: answer[name] for name in ("object", "model", "choices", "usage")}


def alone(app: BatonApp, prompt: Any) -> str:
    return str(post(app.url + PATH, request(prompt))["choices"][0]["text"])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "temperature": 0.9, "seed": 5},
        {"n": 3, "temperature": 0.9, "seed": 5, "logprobs": 1},
        {"temperature": 0.7, "seed": 9, "return_token_ids": True},
        {"echo": True},
        {"stop": ["e"], "max_tokens": 40},
    ],
    ids=["plain", "samples", "logprobs", "ids", "echo", "stop"],
)
@pytest.mark.parametrize("texts", [True, False], ids=["texts", "ids"])
def test_several_prompts_as_one_server(
    app: BatonApp, one_engine: VllmServer, texts: bool, more: dict[str, Any]
) -> None:
    prompts: Any = ["The sea is salty", "Once", "The sea is salty", "A man and a dog went home"]
    body = request(prompts if texts else [one[:40] for one in PROMPTS[:4]], **more)

    answer, expected = post(app.url + PATH, body), post(one_engine.url + PATH, {**body})

    assert told(answer) == told(expected)


@pytest.mark.parametrize("options", [{}, {"include_usage": True}], ids=["plain", "usage"])
def test_streams_of_several_prompts_as_one_server(
    app: BatonApp, one_engine: VllmServer, options: dict[str, Any]
) -> None:
    body = request(
        ["The sea is salty", "Once", "The sea is salty"], n=2, temperature=0.9, seed=3, stream=True
    )
    answer, expected = (
        stream(url, {**body, "stream_options": options}) for url in (app.url, one_engine.url)
    )

    assert answer == expected


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "prompts",
    [["fine", [1] * 2000], [[3, 4], [1] * 2000], [[3, 4], [1 << 40]], ["fine", ""]],
    ids=["mixed", "too long", "unknown token", "empty"],
)
def test_one_wrong_prompt_refuses_all(
    app: BatonApp, one_engine: VllmServer, prompts: Any, streamed: bool
) -> None:
    before = app.totals("prefill")
    body = request(prompts, stream=streamed)

    status, text = ask(app.url, body)

    # vLLM's own stream may begin before it sees an unknown token.
    assert status == ask(one_engine.url, {**body, "stream": False})[0] == 400
    assert json.loads(text)["error"]["message"]
    assert app.totals("prefill") == before


def test_equal_prompts_are_all_read(app: BatonApp) -> None:
    before = app.totals("decode").get("reader_ok", 0)
    expected = alone(app, PROMPTS[0][:120])

    answer = post(app.url + PATH, request([PROMPTS[0][:120]] * 5))

    assert [choice["text"] for choice in answer["choices"]] == [expected] * 5
    assert app.totals("decode")["reader_ok"] == before + 6


def test_more_prompts_than_prefill_has_room_for(app: BatonApp) -> None:
    assert sum(len(prompt) for prompt in PROMPTS) > POOL_BLOCKS * BLOCK
    expected = [alone(app, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        asking = pool.submit(post, app.url + PATH, request(PROMPTS))
        bystander = alone(app, "The sun is warm")
        bystander_s = time.monotonic() - started
        answer = asking.result()
        took_s = time.monotonic() - started

    assert [choice["text"] for choice in answer["choices"]] == expected
    assert took_s < FEW_SECONDS
    assert bystander_s < FEW_SECONDS
    assert bystander == alone(app, "The sun is warm")


def test_an_id_of_any_length_is_the_clients_business(app: BatonApp) -> None:
    for name in ("x" * 600, "x" * 4000):
        connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=60)
        try:
            headers = {"Content-Type": "application/json", "X-Request-Id": name}
            body = json.dumps(request(PROMPTS[1][:200]))
            connection.request("POST", PATH, body, headers)
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert answer["id"] == f"cmpl-{name}"


def test_clients_that_leave_at_any_moment_leave_nothing(app: BatonApp) -> None:
    chance = random.Random(5)
    for number in range(60):
        connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=60)
        body = json.dumps(request([PROMPTS[number % 16][:60], PROMPTS[3][:90]], stream=True))
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        time.sleep(chance.uniform(0.0, 0.08))
        connection.close()


def test_it_stops_promptly_after_all_that(app: BatonApp) -> None:
    """The last one here. Prefill stays for blocks that are still to be read; there are none."""
    post(app.url + PATH, request([PROMPTS[0][:120]] * 5))
    post(app.url + PATH, request(PROMPTS))
    began = time.monotonic()

    app.stop()

    assert time.monotonic() - began < STOP_S
    assert app.process.returncode == EXIT_INTERRUPTED  # of itself, not killed


# ---- clients -------------------------------------------------------------------------------------


def ask(url: str, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def stream(url: str, body: dict[str, Any]) -> Any:
    """What a stream says of every choice, of usage, and how it ends."""
    status, text = ask(url, body)
    *events, done, rest = text.split("\n\n")
    assert (status, done, rest) == (200, "data: [DONE]", "")
    contents = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({content["id"] for content in contents}) == 1
    assert len({content["created"] for content in contents}) == 1
    said: dict[int, list[Any]] = {}
    for content in contents:
        for choice in content["choices"]:
            parts = said.setdefault(choice["index"], ["", None])
            parts[0] += choice["text"]
            parts[1] = choice["finish_reason"] or parts[1]
    usage = [(at - len(contents), c["usage"]) for at, c in enumerate(contents) if c.get("usage")]
    return said, usage, {content["object"] for content in contents if content["choices"]}
