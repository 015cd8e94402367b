"""What the endpoint refuses, before any engine sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from pydantic import BaseModel
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from serve_app.api_keys import ApiKeys
from tests.support.load.malformed_requests import JUNK, bodies
from tests.support.scripted.ingress import (
    ANSWER,
    BEAMS,
    CHAT,
    CHATS,
    COMPLETION,
    COMPLETIONS,
    CONTENT,
    HANG,
    KV_PARAMS,
    MAX_BODY_BYTES,
    SMELL,
    TICKET,
    Endpoint,
    only_key,
)
from transfer.errors import ConfigurationError


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    return Endpoint(monkeypatch)


# ---- refused before any engine sees it -----------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_json_is_refused(endpoint: Endpoint, path: str) -> None:
    headers = {"content-type": "application/json"}

    assert endpoint.refused(400, "POST", path, content="{", headers=headers)["param"] == "body"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {**COMPLETION, "max_tokens": "many"}, "max_tokens"),
        ("/v1/completions", {**COMPLETION, "temperature": "hot"}, "temperature"),
        ("/v1/completions", {**COMPLETION, "prompt": ""}, "prompt"),
        ("/v1/completions", {**BEAMS, "length_penalty": "-5000"}, "length_penalty"),
        ("/v1/completions", {**BEAMS, "length_penalty": -5000}, "length_penalty"),
        ("/v1/chat/completions", {**CHAT, **BEAMS, "length_penalty": "1e9"}, "length_penalty"),
        ("/v1/completions", {**COMPLETION, "prompt": []}, "prompt"),
        (
            "/v1/completions",
            {**COMPLETION, "kv_transfer_params": TICKET.to_params()},
            "kv_transfer_params",
        ),
        ("/v1/chat/completions", {**CHAT, "messages": []}, "messages"),
        ("/v1/chat/completions", {"model": "demo"}, "messages"),
        ("/v1/chat/completions", {**CHAT, "n": "two"}, "n"),
        (
            "/v1/chat/completions",
            {**CHAT, "kv_transfer_params": TICKET.to_params()},
            "kv_transfer_params",
        ),
        ("/v1/chat/completions", {**CHAT, "messages": [SMELL]}, CONTENT),
        ("/tokenize", {"model": "demo", "prompt": 5}, "prompt"),
        ("/tokenize", {"model": "demo", "prompt": "x", "kv_transfer_params": {}}, KV_PARAMS),
        ("/tokenize", {"model": "demo", "prompt": "x" * 101}, "prompt"),
        ("/detokenize", {"model": "demo", "tokens": [1] * 101}, "tokens"),
        ("/detokenize", {"model": "demo", "tokens": [10**12]}, "tokens.0"),
        ("/v1/embeddings", {"model": "demo", "input": "x", "kv_transfer_params": {}}, KV_PARAMS),
        ("/v1/score", {"model": "demo", "text_1": "a", "text_2": 10**30}, "text_2"),
    ],
)
def test_wrong_field_is_named(
    endpoint: Endpoint, path: str, body: dict[str, Any], field: str
) -> None:
    error = endpoint.refused(400, "POST", path, json=body)

    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", COMPLETION),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_unknown_model_is_refused_with_the_known_one(
    endpoint: Endpoint, path: str, body: dict[str, Any]
) -> None:
    error = endpoint.refused(404, "POST", path, json={**body, "model": "gpt-5"})

    assert error["type"] == "not_found_error"
    assert error["param"] == "model"
    assert "'gpt-5'" in error["message"]
    assert "demo" in error["message"]


def test_unknown_path_and_method_are_refused(endpoint: Endpoint) -> None:
    endpoint.refused(404, "GET", "/v2/completions")
    endpoint.refused(405, "GET", "/v1/completions")


@pytest.mark.parametrize("extra", ["{}", "[" * 100_000, '{"kv_transfer_params": "x"}'])
def test_what_is_not_served_is_not_found_whatever_comes(
    monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    roomy = Endpoint(monkeypatch, max_body_bytes=1 << 20)
    form = {"data": {"model": "demo", "vllm_xargs": extra}, "files": {"file": b"RIFF"}}

    roomy.refused(404, "POST", "/v1/audio/transcriptions", **form)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, COMPLETION),
        (CHATS, CHAT),
        ("/tokenize", COMPLETION),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/embeddings", {"model": "demo", "input": "x"}),
        ("/v1/score", {"model": "demo", "text_1": "a", "text_2": "b"}),
    ],
)
def test_headers_are_judged_wherever_an_engine_is_asked(
    endpoint: Endpoint, path: str, body: dict[str, Any]
) -> None:
    headers = {"x-vllm-priority": "9" * 40}

    error = endpoint.refused(400, "POST", path, json=body, headers=headers)

    assert error["param"] == "x-vllm-priority"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "param", "said"),
    [
        (b'{"prompt": "\xff"}', JSON, "body", "the body is not valid JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", JSON, "body", "the body is not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, JSON, "body", "the body is not valid JSON"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, "a", "more than 100 lists"),
        (b'{"prompt": "\\ud800"}', JSON, "prompt", "half of a surrogate pair"),
        (b'{"temperature": NaN}', JSON, "temperature", "it must be a finite number"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, "Content-Type", "application/json"),
        (b'{"prompt": "x"}', {}, "Content-Type", "application/json"),
        (b'{"prompt": "x"}', {**JSON, "x-vllm-priority": "9" * 40}, "x-vllm-priority", "between"),
    ],
)
def test_what_cannot_be_read_is_named(
    endpoint: Endpoint, content: bytes, headers: dict[str, Any], param: str, said: str
) -> None:
    error = endpoint.refused(400, "POST", "/v1/completions", content=content, headers=headers)

    assert error["type"] == "invalid_request_error"
    assert param in error["param"]
    assert said in error["message"]


@pytest.mark.parametrize(
    ("path", "model", "good"),
    [
        ("/v1/completions", CompletionRequest, COMPLETION),
        ("/v1/chat/completions", ChatCompletionRequest, CHAT),
    ],
)
def test_any_body_is_answered_or_refused(
    endpoint: Endpoint, path: str, model: type[BaseModel], good: dict[str, Any]
) -> None:
    @given(bodies(model, good) | bodies(model, {}) | JUNK)
    @settings(max_examples=100)
    def check(body: Any) -> None:
        endpoint.caller.chunks = [ANSWER]
        response = endpoint.ask("POST", path, content=json.dumps(body), headers=JSON)
        assert response.status_code in (200, 400, 404), body
        if response.status_code != 200:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == response.status_code
            assert error["param"], body

    check()


def test_long_body_is_refused(endpoint: Endpoint) -> None:
    body = {**COMPLETION, "prompt": "x" * MAX_BODY_BYTES}

    assert endpoint.refused(413, "POST", "/v1/completions", json=body)["param"] == "body"


def test_stranger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(monkeypatch, api_keys=only_key(monkeypatch))

    endpoint.refused(401, "POST", "/v1/completions", json=COMPLETION)
    endpoint.refused(401, "GET", "/v1/models")
    key = {"authorization": "Bearer the-only-key"}
    assert endpoint.ask("GET", "/v1/models", headers=key).status_code == 200
    assert endpoint.ask("GET", "/health").status_code == 200


def test_an_ingress_without_its_keys_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"\$\{NO_SUCH_KEY\}"):
        Endpoint(monkeypatch, api_keys=ApiKeys(["${NO_SUCH_KEY}"]))


# ---- too much at once ----------------------------------------------------------------------------


def test_more_requests_than_allowed_get_429_with_retry_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = Endpoint(monkeypatch, max_requests=1)
    endpoint.caller.chunks = [HANG]

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(endpoint.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION))
            await endpoint.caller.begun.wait()
            second = await client.post("/v1/completions", json=COMPLETION)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            return second

    response = asyncio.run(main())

    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", 429)
    assert endpoint.caller.roles() == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [[1]] * 2, "n": 3}, "prompt"),
        ({"n": 5}, "n"),
        ({"n": "5"}, "n"),
        ({"n": 5.0}, "n"),
    ],
)
def test_too_many_answers_of_one_request(
    endpoint: Endpoint, more: dict[str, Any], field: str
) -> None:
    error = endpoint.refused(400, "POST", "/v1/completions", json={**COMPLETION, **more})

    assert error["param"] == field
    assert "more than 4 answers" in error["message"]


@pytest.mark.parametrize("name", ["user", "unknown"])
def test_several_prompts_carry_no_more_than_a_body_has(endpoint: Endpoint, name: str) -> None:
    large = "é" * (MAX_BODY_BYTES // 6)
    endpoint.caller.chunks = [ANSWER]

    for prompt in ("a", ["a"], ["a", "b"]):
        body = {**COMPLETION, "prompt": prompt, name: large}
        assert endpoint.ask("POST", COMPLETIONS, json=body).status_code == 200
    endpoint.caller.calls.clear()

    error = endpoint.refused(
        400, "POST", COMPLETIONS, json={**COMPLETION, "prompt": ["a"] * 4, name: large}
    )
    assert error["param"] == "prompt"
    assert error["message"].startswith("prompt: 4 prompts, each with the ")
    # Those that go to decode as they are carry it once.
    whole = {**COMPLETION, "prompt": ["a"] * 4, name: large, "use_beam_search": True}
    assert endpoint.ask("POST", COMPLETIONS, json=whole).status_code == 200
