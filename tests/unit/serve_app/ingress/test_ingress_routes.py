"""What the endpoint answers."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from deployments.errors import NoReplica, ReplicaLost
from deployments.streams.answer import Refusal
from tests.support.scripted.ingress import (
    ANSWER,
    CHAT,
    COMPLETION,
    DONE,
    HANG,
    ONE,
    TICKET,
    Endpoint,
)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    return Endpoint(monkeypatch)


def test_models_are_listed(endpoint: Endpoint) -> None:
    listed = endpoint.ask("GET", "/v1/models").json()

    assert [card["id"] for card in listed["data"]] == ["demo"]


@pytest.mark.parametrize("name", ["pirate", "org/sailor:v2"])
def test_adapters_are_listed_and_served_like_the_model(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    endpoint = Endpoint(monkeypatch, adapters=("pirate", "org/sailor:v2"))
    endpoint.caller.chunks = [ANSWER]

    listed = endpoint.ask("GET", "/v1/models").json()
    card = endpoint.ask("GET", f"/v1/models/{name}")
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert endpoint.ask("POST", path, json={**body, "model": name}).status_code == 200
    tokens = endpoint.ask("POST", "/tokenize", json={"model": name, "prompt": "Once"})

    assert [card["id"] for card in listed["data"]] == ["demo", "pirate", "org/sailor:v2"]
    assert (card.status_code, card.json()["id"]) == (200, name)
    assert (tokens.status_code, tokens.json()["tokens"]) == (200, [1])
    assert endpoint.caller.roles() == ["prefill", "decode", "prefill", "decode", "decode"]
    assert {body.model for _, _, body in endpoint.caller.calls} == {name}


def test_a_name_that_is_nobodys_is_refused_with_all_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = Endpoint(monkeypatch, adapters=("pirate",))
    error = endpoint.refused(404, "POST", "/v1/completions", json={**COMPLETION, "model": "demo:x"})
    assert error["message"] == "model: there is no model 'demo:x' here, only demo, pirate"


@pytest.mark.parametrize("name", ["r7", "r" * 600, 'say "no" \\ more'])
@pytest.mark.parametrize(
    ("path", "body", "method"),
    [("/v1/completions", COMPLETION, "completions"), ("/v1/chat/completions", CHAT, "chat")],
)
def test_complete_answer_goes_through_prefill_and_decode(
    endpoint: Endpoint, path: str, body: dict[str, Any], method: str, name: str
) -> None:
    endpoint.caller.chunks = [ANSWER]

    response = endpoint.ask("POST", path, json=body, headers={"x-request-id": name})

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()["id"] == f"cmpl-{name}"
    assert [(side, name) for side, name, _ in endpoint.caller.calls] == [
        ("prefill", method),
        ("decode", method),
    ]
    # Replicas know it by a name of Baton's own.
    assert len({request.request_id for _, _, request in endpoint.caller.calls}) == 1
    assert len(endpoint.caller.calls[0][2].request_id) == 32
    assert endpoint.caller.calls[1][2].kv_transfer_params == TICKET.to_params()


def test_stream_is_sent_as_events(endpoint: Endpoint) -> None:
    endpoint.caller.chunks = [ONE, ONE, DONE]

    response = endpoint.ask("POST", "/v1/completions", json={**COMPLETION, "stream": True})

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text == ONE + ONE + DONE


@pytest.mark.parametrize(
    "body",
    [
        {**COMPLETION, "prompt_logprobs": 1},
        {**COMPLETION, "prompt_embeds": "AAAA"},
        {"model": "demo", "prompt_embeds": ["AAAA", "BBBB"]},
    ],
)
def test_request_that_cannot_use_foreign_blocks_goes_to_decode_alone(
    endpoint: Endpoint, body: dict[str, Any]
) -> None:
    endpoint.caller.chunks = [ANSWER]

    response = endpoint.ask("POST", "/v1/completions", json=body)

    assert response.status_code == 200
    assert endpoint.caller.roles() == ["decode"]


@pytest.mark.parametrize(
    ("path", "asked", "field"),
    [
        ("/v1/completions", {"prompt": "x" * 10, "prompt_logprobs": 10}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x" * 10, "echo": True, "logprobs": 10}, "logprobs"),
        ("/v1/completions", {"prompt": [7] * 51, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": [[7] * 26] * 2, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x" * 26, "n": 4, "prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"prompt_logprobs": 20}, "prompt_logprobs"),
        ("/v1/chat/completions", {"echo": True, "logprobs": True, "top_logprobs": 20}, "top_"),
    ],
)
def test_too_many_logprobs_of_prompts_are_refused(
    endpoint: Endpoint, path: str, asked: dict[str, Any], field: str
) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), **asked}

    error = endpoint.refused(400, "POST", path, json=body)

    assert error["param"].startswith(field)
    assert "100; ask for fewer" in error["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "x" * 10, "prompt_logprobs": 9},
        {"prompt": "x" * 10, "echo": True, "logprobs": 9},
        {"prompt": "x" * 25, "n": 4, "prompt_logprobs": 0},
        {"prompt": [7] * 1000, "logprobs": 5},
        {"prompt": "x" * 1000, "echo": True},
    ],
)
def test_as_many_as_are_allowed_pass(endpoint: Endpoint, asked: dict[str, Any]) -> None:
    endpoint.caller.chunks = [ANSWER]

    answer = endpoint.ask("POST", "/v1/completions", json={**COMPLETION, **asked})

    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_of_an_engine_keeps_its_status(endpoint: Endpoint, stream: bool) -> None:
    endpoint.caller.chunks = [Refusal("too long", "BadRequestError", code=400)]

    response = endpoint.ask("POST", "/v1/completions", json={**COMPLETION, "stream": stream})

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert endpoint.caller.aborted == [("p1", TICKET)]


@pytest.mark.parametrize(
    ("message", "param"),
    [("n must be at least 1, got 0.", "n"), ("`stop` cannot hold it", "stop"), ("No way", None)],
)
def test_refusal_of_an_engine_names_the_field_that_its_words_begin_with(
    endpoint: Endpoint, message: str, param: str | None
) -> None:
    endpoint.caller.chunks = [Refusal(message, "BadRequestError", code=400)]

    error = endpoint.ask("POST", "/v1/completions", json=COMPLETION).json()["error"]

    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize("chunks", [[NoReplica("decode", 1.0)], []])
def test_no_decode_replica_is_503_with_retry_after(
    endpoint: Endpoint, chunks: list[Exception]
) -> None:
    endpoint.caller.chunks = chunks

    response = endpoint.ask("POST", "/v1/completions", json={**COMPLETION, "stream": True})

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "server_error"


def test_decode_lost_in_mid_stream_ends_in_an_error_event(endpoint: Endpoint) -> None:
    endpoint.caller.chunks = [ONE, ReplicaLost("decode", "d1", "it died")]

    response = endpoint.ask("POST", "/v1/completions", json={**COMPLETION, "stream": True})

    first, error, done, rest = response.text.split("\n\n")
    assert first + "\n\n" == ONE
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert (done, rest) == ("data: [DONE]", "")


def test_client_that_leaves_in_mid_stream_ends_the_decode_call(endpoint: Endpoint) -> None:
    endpoint.caller.chunks = [ONE, HANG]
    body = json.dumps({**COMPLETION, "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def main() -> None:
        got_chunk = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await got_chunk.wait()
            assert endpoint.caller.decoding == 1
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                got_chunk.set()

        await asyncio.wait_for(endpoint.app(scope, receive, send), 5)
        # Starlette drops the stream; what it dropped is closed in the loop's next rounds.
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        assert endpoint.caller.decoding == 0

    asyncio.run(main())
    assert endpoint.caller.roles() == ["prefill", "decode"]
