"""Two prefill and two decode replicas of the tiny model: every kind of request, and every pair."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.models.tiny_adapter import make_tiny_adapter
from tests.support.network.stand_in_proxy import StandInProxy
from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.vllm_server import VllmServer, get, metric, post

pytestmark = pytest.mark.timeout(600)

MODEL = "tiny"
ADAPTER = "org/pirate:v1"
MAX_MODEL_LEN = 1024
MAX_BODY_BYTES = 1 << 20
PROMPT = "The quick brown fox jumps over the lazy dog and then it goes home to sleep."
MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Tell me about the sea, the sun and the wind."},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_adapter(tmp_path_factory.mktemp("adapter") / "lora", seed=1)


@pytest.fixture(scope="module")
def one_engine(
    tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("one-engine") / "server.log"
    arguments = [
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}"),
    ]
    with VllmServer(tiny_model, arguments, log) as server:
        yield server


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandInProxy]:
    with StandInProxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def app(
    tiny_model: Path,
    adapter: Path,
    one_engine: VllmServer,
    stand_in: StandInProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("2p2d")
    config = write_config(
        folder,
        model=str(tiny_model),
        model_id=MODEL,
        engine={
            "max_model_len": MAX_MODEL_LEN,
            "enable_auto_tool_choice": True,
            "tool_call_parser": "hermes",
            "enable_lora": True,
            "max_lora_rank": 8,
            "lora_modules": [{"name": ADAPTER, "path": str(adapter)}],
        },
        prefill={"replicas": 2},
        decode={"replicas": 2},
        router={"max_body_bytes": MAX_BODY_BYTES},
    )
    with BatonApp(config, folder / "up.log", stand_in.environment) as running:
        one_engine.wait()
        _wait_until_all_serve(running)
        yield running


def _wait_until_all_serve(app: BatonApp) -> None:
    """``/health`` needs one replica of a side; this module needs two."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status = app.status()
        if all(len(status[side]) == 2 for side in ("prefill", "decode")):
            return
        time.sleep(1)
    pytest.fail(f"not all replicas came up: {app.status()}")


def _wait_unpinned(app: BatonApp) -> None:
    deadline = time.monotonic() + 10
    while app.pinned_blocks():
        if time.monotonic() > deadline:
            pytest.fail(f"blocks stayed pinned: {app.status()}")
        time.sleep(0.1)


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min_tokens": {"min_tokens": 12},
    "max_tokens-1": {"max_tokens": 1},
    "no-max_tokens": {"max_tokens": None, "stop": ["the"]},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "echo": {"echo": True},
    "echo-logprobs": {"echo": True, "logprobs": 2},
    "n": {"n": 3, "temperature": 0.9, "seed": 5},
    "best_of": {"best_of": 2, "n": 1},
    "stop": {"stop": ["a", "e"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [5, 9, 17, 40]},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "seeded-sampling": {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 3},
    "structured-regex": {"structured_outputs": {"regex": "[a-z]{3,8}"}},
    "structured-json": {"structured_outputs": {"json": SCHEMA}},
    "structured-choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "two-prompts": {"prompt": [PROMPT, "Another one, " * 12]},
    "token-ids": {"prompt": [7, 8, 9, 10] * 20},
    "token-id-prompts": {"prompt": [[7, 8, 9] * 15, [30, 31] * 40]},
    "cache_salt": {"cache_salt": "mine"},
    "truncate": {"truncate_prompt_tokens": 20},
    "truncate-to-the-room": {"prompt": PROMPT * 40, "truncate_prompt_tokens": -1},
    "logprob_token_ids": {"logprobs": 2, "logprob_token_ids": [50, 60]},
    "beam-search": {"use_beam_search": True, "n": 2},
    "suffixless-user": {"user": "somebody"},
    "adapter": {"model": ADAPTER},
}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"model": ADAPTER},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 9},
    "min_tokens": {"min_tokens": 10},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "n": {"n": 2, "temperature": 0.9, "seed": 8},
    "echo": {"echo": True},
    "logprob_token_ids": {"logprobs": True, "logprob_token_ids": [50, 60]},
    "truncate-to-the-model": {"truncate_prompt_tokens": MAX_MODEL_LEN, "max_tokens": None},
    "truncate-to-the-room": {
        "messages": [{"role": "user", "content": PROMPT * 40}],
        "truncate_prompt_tokens": -1,
    },
    "stop": {"stop": ["o"]},
    "response_format": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA},
        }
    },
    "json_object": {"response_format": {"type": "json_object"}, "max_tokens": 10},
    "tools-named": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "tools-required": {"tools": [WEATHER], "tool_choice": "required"},
    "tools-none": {"tools": [WEATHER], "tool_choice": "none"},
    "continue_final_message": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "The sea"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "content-parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello there."}]}]
    },
}


def _essence(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what must differ between two servers: ids and times."""
    if "error" in answer:
        return {"error": answer["error"]["code"]}
    choices = json.loads(json.dumps(answer["choices"]))
    for choice in choices:
        for call in (choice.get("message") or {}).get("tool_calls") or []:
            call.pop("id")
    keep = ("usage", "prompt_logprobs", "object")
    essence = {key: answer.get(key) for key in keep}
    return {**essence, "choices": sorted(choices, key=lambda choice: int(choice["index"]))}


def _both(
    app: BatonApp, one_engine: VllmServer, path: str, body: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    return post(f"{app.url}{path}", body), post(f"{one_engine.url}{path}", body)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_as_one_engine(app: BatonApp, one_engine: VllmServer, name: str) -> None:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 16,
        "temperature": 0,
        **COMPLETIONS[name],
    }
    ours, theirs = _both(app, one_engine, "/v1/completions", body)
    assert "error" not in theirs, theirs
    assert _essence(ours) == _essence(theirs)
    _wait_unpinned(app)


@pytest.mark.parametrize("name", CHATS)
def test_chats_as_one_engine(app: BatonApp, one_engine: VllmServer, name: str) -> None:
    body = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 16,
        "temperature": 0,
        **CHATS[name],
    }
    ours, theirs = _both(app, one_engine, "/v1/chat/completions", body)
    assert "error" not in theirs, theirs
    assert _essence(ours) == _essence(theirs)
    _wait_unpinned(app)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_as_one_engine(app: BatonApp, one_engine: VllmServer, path: str) -> None:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body.pop("messages" if path == "/v1/completions" else "prompt")
    ours, theirs = (_stream(url, path, body) for url in (app.url, one_engine.url))
    assert ours == theirs


def _stream(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A stream's whole text, how it ended, and its usage; vLLM may put tokens together."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    events = [json.loads(item) for item in data[:-1]]
    choices = [event["choices"][0] for event in events if event["choices"]]
    texts = [choice.get("text", choice.get("delta", {}).get("content")) for choice in choices]
    return {
        "text": "".join(text or "" for text in texts),
        "objects": {event["object"] for event in events},
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": [event["usage"] for event in events if event.get("usage")],
    }


def test_every_pair_hands_over(app: BatonApp) -> None:
    """Each decode worker reads from each prefill worker, found through etcd."""
    deadline = time.monotonic() + 60
    pairs: set[tuple[str, str]] = set()
    number = 0
    while len(pairs) < 4 and time.monotonic() < deadline:
        with ThreadPoolExecutor(4) as pool:
            bodies = [
                {"model": MODEL, "prompt": f"{number + k} {PROMPT}", "max_tokens": 4}
                for k in range(8)
            ]
            answers = list(pool.map(lambda body: post(f"{app.url}/v1/completions", body), bodies))
        number += 8
        assert all(len(answer["choices"]) == 1 for answer in answers)
        pairs = {
            (worker["engine_id"], owner)
            for worker in app.status()["decode"]
            for owner, count in worker["reads_by_owner"].items()
            if count
        }
    owners = {worker["engine_id"] for worker in app.status()["prefill"]}
    readers = {worker["engine_id"] for worker in app.status()["decode"]}
    assert pairs == {(reader, owner) for reader in readers for owner in owners}
    _wait_unpinned(app)
    assert app.totals("decode").get("recomputed_tokens", 0) == 0


BAD: dict[str, tuple[str, Any, int, str | None]] = {
    "malformed JSON": ("/v1/completions", "{not json", 400, "body"),
    "no body": ("/v1/completions", "", 400, "body"),
    "not an object": ("/v1/completions", [1, 2], 400, None),
    "no prompt": ("/v1/completions", {"model": MODEL}, 400, "prompt"),
    "empty prompt": ("/v1/completions", {"model": MODEL, "prompt": ""}, 400, "prompt"),
    "prompt of wrong type": ("/v1/completions", {"model": MODEL, "prompt": 7}, 400, "prompt"),
    "max_tokens of wrong type": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "max_tokens": "many"},
        400,
        "max_tokens",
    ),
    "max_tokens negative": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "max_tokens": -1},
        400,
        "max_tokens",
    ),
    "temperature negative": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "temperature": -2},
        400,
        "temperature",
    ),
    "too many logprobs": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "logprobs": 500},
        400,
        "logprobs",
    ),
    "unknown model": ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "model"),
    "unknown model in chat": (
        "/v1/chat/completions",
        {"model": "other", "messages": MESSAGES},
        404,
        "model",
    ),
    "empty messages": ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "messages"),
    "no messages": ("/v1/chat/completions", {"model": MODEL}, 400, "messages"),
    "message without role": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"content": "x"}]},
        400,
        "messages",
    ),
    "prompt too long": (
        "/v1/completions",
        {"model": MODEL, "prompt": [9] * (MAX_MODEL_LEN + 5)},
        400,
        "input_tokens",
    ),
    "chat too long": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "sea " * MAX_MODEL_LEN}]},
        400,
        "input_tokens",
    ),
    "forged ticket": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "kv_transfer_params": {"do_remote_prefill": True}},
        400,
        "kv_transfer_params",
    ),
    "body too long": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x" * (MAX_BODY_BYTES + 1)},
        413,
        "body",
    ),
    "bad regex": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "("}},
        400,
        None,
    ),
    "no such route": ("/v1/nothing", {}, 404, None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_engine_sees_it(app: BatonApp, name: str) -> None:
    path, body, status, param = BAD[name]
    before = app.totals("prefill"), app.totals("decode")
    host = app.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        raw = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    assert response.status == status, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] == status
    if param is not None:
        assert str(error["param"]).split(".")[0] == param
    assert (app.totals("prefill"), app.totals("decode")) == before
    assert app.pinned_blocks() == 0


def test_metrics_of_baton_and_vllm_appear(app: BatonApp) -> None:
    post(f"{app.url}/v1/completions", {"model": MODEL, "prompt": PROMPT + " And now?"})
    deadline = time.monotonic() + 40
    while True:
        text = get(f"{app.url}/metrics")[1]
        read = metric(text, "ray_baton_handoffs_total", side="reader", outcome="ok")
        if read >= app.totals("decode")["reader_ok"] or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert read == app.totals("decode")["reader_ok"]
    assert metric(text, "ray_baton_transfer_bytes_total") == app.totals("decode")["bytes"]
    assert metric(text, "ray_baton_transfer_tokens_total") == app.totals("decode")["tokens"]
    assert metric(text, "ray_baton_recomputed_tokens_total") == 0
    # Everything that was offered was read or given back: no wait was ended by expiry.
    assert metric(text, "ray_baton_handoffs_total", side="owner", outcome="released") >= read
    assert metric(text, "ray_baton_handoffs_total", side="owner", outcome="expired") == 0
    assert app.totals("prefill").get("owner_expired", 0) == 0
    assert metric(text, "ray_baton_transfer_seconds_count") >= read
    assert metric(text, "ray_baton_handoff_seconds_count") >= read
    assert metric(text, "ray_baton_pinned_blocks") == 0
    assert metric(text, "ray_vllm_generation_tokens_total") > 0


def test_no_connection_inside_goes_by_a_proxy_of_the_environment(
    app: BatonApp, stand_in: StandInProxy
) -> None:
    assert [words for words in stand_in.contacts if b"127." in words or b"localhost" in words] == []
