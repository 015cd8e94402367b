from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from pydantic import BaseModel
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionResponse,
    ErrorInfo,
    ErrorResponse,
    ModelCard,
    TokenizeResponse,
)
from ray.llm._internal.serve.core.ingress.ingress import make_fastapi_ingress

from deployments.admission import AdmissionPolicy
from deployments.errors import NoReplica, ReplicaLost
from deployments.generation import GenerationRequest, Output, PrefillAnswer, WholeAnswer
from deployments.handoff_state import RetryPolicy
from deployments.health import TransferUnhealthy
from deployments.replica import ReplicaCaller
from serve_app.api_keys import ApiKeys
from serve_app.body_limits import BodyLimits
from serve_app.cache_salt import cache_salt, salt_of_key
from serve_app.ingress import Ingress, ingress_app
from serve_app.metrics import SCRAPE_KEPT_S
from tests.support.malformed_requests import JUNK, bodies
from tests.support.scripted_handles import FakeHandle, answers, fails
from tests.support.tickets import make_ticket
from transfer.errors import ConfigurationError

TICKET: dict[str, Any] = make_ticket().to_params()
ONE, DONE = 'data: {"text": "one"}\n\n', "data: [DONE]\n\n"
ANSWER = "answer"
"""In a script: a completion with the name by which the replica knows the request."""
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Once"}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
BEAMS: dict[str, Any] = {**COMPLETION, "use_beam_search": "true", "n": 2, "max_tokens": 3}
KV_PARAMS, CONTENT = "kv_transfer_params", "messages.0.content.0.text"
SMELL: dict[str, Any] = {"role": "user", "content": [{"type": "smell"}]}
MAX_BODY_BYTES = 16 << 10
HANG = "hang"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@dataclass
class FakeCaller:
    """Stands in for ReplicaCaller: replicas that answer by a script."""

    prefilled: PrefillAnswer = field(default_factory=lambda: PrefillAnswer("p1", TICKET))
    chunks: Sequence[Any] = ()
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    aborted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    not_ready: dict[str, Exception] = field(default_factory=dict)
    decoding: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def check(self, request: GenerationRequest) -> Any | None:
        self.calls.append(("check", request.method, request.body))
        return None

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        self.calls.append(("prefill", request.method, request.body))
        return self.prefilled

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        self.calls.append(("decode", request.method, request.body))
        self.decoding += 1
        self.begun.set()
        try:
            for chunk in self.chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk == HANG:
                    await asyncio.Event().wait()
                if chunk == ANSWER:
                    chunk = _answer(request.body.request_id)
                yield Output(chunk, "d1", refused=isinstance(chunk, ErrorResponse))
        finally:
            self.decoding -= 1

    async def abort(self, replica_id: str, ticket: Mapping[str, Any]) -> int:
        self.aborted.append((replica_id, dict(ticket)))
        return 1

    async def ready(self, role: str, timeout_s: float) -> str:
        if role in self.not_ready:
            raise self.not_ready[role]
        return f"{role}-1"

    def sides(self) -> list[str]:
        return [side for side, _, _ in self.calls]


def _answer(request_id: str) -> WholeAnswer:
    response = CompletionResponse(
        id=f"cmpl-{request_id}",
        model="demo",
        choices=[],
        usage={"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
    )
    return WholeAnswer(response.model_dump_json().encode())


NO_KEYS = ApiKeys([])


def only_key(monkeypatch: pytest.MonkeyPatch) -> ApiKeys:
    monkeypatch.setenv("ENDPOINT_TEST_KEY", "the-only-key")
    return ApiKeys(["${ENDPOINT_TEST_KEY}"])


class Endpoint:
    """The ingress as Serve mounts it, without Serve."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        api_keys: ApiKeys = NO_KEYS,
        max_requests: int = 8,
        allowed_origins: tuple[str, ...] = ("*",),
        adapters: tuple[str, ...] = (),
        cache_salt_by_key: bool = False,
    ) -> None:
        self.caller = FakeCaller()
        apps: list[Any] = []

        def remember(cls: type, *, endpoint_map: Any, app: Any) -> Any:
            apps.append(app)
            return make_fastapi_ingress(cls, endpoint_map=endpoint_map, app=app)

        monkeypatch.setattr("serve_app.ingress.make_fastapi_ingress", remember)
        monkeypatch.setattr("serve_app.ingress.ReplicaCaller", lambda *args, **kwargs: self.caller)
        ingress_app(
            limits=BodyLimits(MAX_BODY_BYTES, MAX_BODY_BYTES, timeout_s=5.0),
            api_keys=api_keys,
            allowed_origins=allowed_origins,
        )
        (self.app,) = apps
        handle: Any = SimpleNamespace(options=self._options)
        instance = Ingress(
            handle,
            handle,
            model_cards=[
                ModelCard(id=name, object="model", owned_by="baton", permission=[], metadata={})
                for name in ("demo", *adapters)
            ],
            policy=RetryPolicy(attempts=2, backoff_s=0.0),
            admission=AdmissionPolicy(max_requests=max_requests),
            max_prompts=4,
            prompts_at_once=2,
            max_body_bytes=MAX_BODY_BYTES,
            max_prompt_logprobs=100,
            max_tokenize_length=100,
            pick_timeout_s=1.0,
            health_timeout_s=1.0,
            api_keys=api_keys,
            cache_salt_by_key=cache_salt_by_key,
        )
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=instance)
        )

    def _options(self, *, stream: bool) -> Any:
        """Of a replica's handle, for what goes to decode as Ray sends it."""
        return SimpleNamespace(tokenize=SimpleNamespace(remote=self._tokenize))

    async def _tokenize(self, body: Any, request: Any) -> AsyncGenerator[Any, None]:
        self.caller.calls.append(("decode", "tokenize", body))
        yield TokenizeResponse(tokens=[1], count=1, max_model_len=8)

    def ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **content)

        return asyncio.run(main())

    def refused(self, status: int, method: str, path: str, **content: Any) -> dict[str, Any]:
        """The error of a request that no replica may have seen."""
        response = self.ask(method, path, **content)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert self.caller.calls == []
        return error


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
        ("/v1/completions", {**COMPLETION, "kv_transfer_params": TICKET}, "kv_transfer_params"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, "messages"),
        ("/v1/chat/completions", {"model": "demo"}, "messages"),
        ("/v1/chat/completions", {**CHAT, "n": "two"}, "n"),
        ("/v1/chat/completions", {**CHAT, "kv_transfer_params": TICKET}, "kv_transfer_params"),
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
    monkeypatch.setattr(f"{__name__}.MAX_BODY_BYTES", 1 << 20)
    form = {"data": {"model": "demo", "vllm_xargs": extra}, "files": {"file": b"RIFF"}}

    Endpoint(monkeypatch).refused(404, "POST", "/v1/audio/transcriptions", **form)


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


# ---- prompts of different keys -------------------------------------------------------------------

TWO_KEYS = ("the-first-key", "the-second-key")


@pytest.fixture
def salting(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setenv("ENDPOINT_TEST_KEYS", "\n".join(TWO_KEYS))
    return Endpoint(monkeypatch, ApiKeys(["${ENDPOINT_TEST_KEYS}"]), cache_salt_by_key=True)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", TWO_KEYS)
@pytest.mark.parametrize("own", [None, "blue"])
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, COMPLETION), (CHATS, CHAT)])
def test_both_sides_get_one_salt_of_key_and_client(
    salting: Endpoint, path: str, body: dict[str, Any], own: str | None, key: str
) -> None:
    salting.caller.chunks = [ANSWER]

    answer = salting.ask("POST", path, json={**body, "cache_salt": own}, headers=bearer(key))

    assert answer.status_code == 200
    right = cache_salt(salt_of_key(key.encode()), own)
    assert [(side, seen.cache_salt) for side, _, seen in salting.caller.calls] == [
        ("prefill", right),
        ("decode", right),
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "demo", "input": "x"}),
        ("/v1/embeddings", {"model": "demo", "messages": CHAT["messages"]}),
        ("/v1/score", {"model": "demo", "text_1": "a", "text_2": "b"}),
    ],
)
def test_what_decode_answers_alone_is_salted_too(
    salting: Endpoint, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    seen: list[str | None] = []

    async def answers(self: Ingress, *, body: Any, **_: Any) -> AsyncGenerator[Any, None]:
        seen.append(body.cache_salt)
        yield ErrorResponse(error=ErrorInfo(message="no", type="BadRequestError", code=400))

    monkeypatch.setattr(Ingress, "_get_response", answers)
    for key in TWO_KEYS:
        salting.ask("POST", path, json={**body, "cache_salt": "blue"}, headers=bearer(key))

    assert seen == [cache_salt(salt_of_key(key.encode()), "blue") for key in TWO_KEYS]


def test_without_the_setting_a_salt_of_the_client_goes_through_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = Endpoint(monkeypatch, api_keys=only_key(monkeypatch))
    endpoint.caller.chunks = [ANSWER]

    for own in (None, "blue"):
        body = {**COMPLETION, "cache_salt": own}
        endpoint.ask("POST", COMPLETIONS, json=body, headers=bearer("the-only-key"))
    assert [seen.cache_salt for _, _, seen in endpoint.caller.calls] == [None] * 2 + ["blue"] * 2


# ---- pages in browsers ---------------------------------------------------------------------------

PAGE = {"origin": "https://chat.example.com"}
PREFLIGHT = {
    **PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_a_browser_that_asks_first_is_told_before_a_key_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = Endpoint(monkeypatch, api_keys=only_key(monkeypatch))

    told = endpoint.ask("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)

    assert told.status_code == 200
    assert told.headers["access-control-allow-origin"] == "*"
    assert "POST" in told.headers["access-control-allow-methods"]
    assert "authorization" in told.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in told.headers


def test_pages_may_read_answers_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(monkeypatch, api_keys=only_key(monkeypatch))

    for status, headers in ((200, {"authorization": "Bearer the-only-key"}), (401, {})):
        answer = endpoint.ask("GET", "/v1/models", headers={**PAGE, **headers})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("allowed", "told"),
    [
        (("https://chat.example.com",), "https://chat.example.com"),
        (("https://other.example.com",), None),
        ((), None),
    ],
)
def test_only_pages_of_allowed_origins_may(
    monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...], told: str | None
) -> None:
    endpoint = Endpoint(monkeypatch, allowed_origins=allowed)

    preflight = endpoint.ask("OPTIONS", "/v1/models", headers=PREFLIGHT)
    answer = endpoint.ask("GET", "/v1/models", headers=PAGE)

    assert preflight.status_code == (400 if told is None else 200)
    for one in (preflight, answer):
        assert one.headers.get("access-control-allow-origin") == told


# ---- answered ------------------------------------------------------------------------------------


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
    assert endpoint.caller.sides() == ["prefill", "decode", "prefill", "decode", "decode"]
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
    assert endpoint.caller.calls[1][2].kv_transfer_params == TICKET


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
    assert endpoint.caller.sides() == ["decode"]


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
    error = ErrorResponse(error=ErrorInfo(message="too long", type="BadRequestError", code=400))
    endpoint.caller.chunks = [error]

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
    endpoint.caller.chunks = [
        ErrorResponse(error=ErrorInfo(message=message, type="BadRequestError", code=400))
    ]

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
    assert endpoint.caller.sides() == ["prefill", "decode"]


# ---- health --------------------------------------------------------------------------------------


def test_health_asks_both_sides(endpoint: Endpoint) -> None:
    response = endpoint.ask("GET", "/health")

    assert response.status_code == 200
    assert response.json() == {"status": "ok", "prefill": "ok", "decode": "ok"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoReplica("decode", 5.0), "no decode replica took the request within 5.0 s"),
        (ReplicaLost("decode", "d1", "it died"), "decode replica d1 was lost: it died"),
        (TimeoutError(), "no decode replica answered within 1 s"),
    ],
)
def test_health_says_which_side_is_missing(endpoint: Endpoint, error: Exception, said: str) -> None:
    endpoint.caller.not_ready = {"decode": error}

    response = endpoint.ask("GET", "/health")

    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "prefill": "ok", "decode": said}


def test_health_says_which_transfer_engine_is_down(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles: Any = [
        FakeHandle({"p1": fails(TransferUnhealthy("the transfer engine of rank 0 of e is down"))}),
        FakeHandle({"d1": answers("d1")}),
    ]
    caller = ReplicaCaller(*handles, pick_timeout_s=1.0)
    monkeypatch.setattr(endpoint.caller, "ready", caller.ready)

    response = endpoint.ask("GET", "/health")

    assert response.status_code == 503
    assert response.json() == {
        "status": "unavailable",
        "prefill": "prefill replica p1 was lost: it is not well: "
        "the transfer engine of rank 0 of e is down",
        "decode": "ok",
    }


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_are_gathered_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = 0

    async def gather() -> str:
        nonlocal gathered
        gathered += 1
        text = f"metrics {gathered}"
        await asyncio.sleep(0.05)
        return text

    monkeypatch.setattr("serve_app.ingress.scrape", gather)
    endpoint = Endpoint(monkeypatch)

    async def main() -> None:
        transport = httpx.ASGITransport(endpoint.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            told = await asyncio.gather(*(client.get("/metrics") for _ in range(64)))
            assert {(answer.status_code, answer.text) for answer in told} == {(200, "metrics 1")}
            assert (await client.get("/metrics")).text == "metrics 1"
            await asyncio.sleep(SCRAPE_KEPT_S)
            assert (await client.get("/metrics")).text == "metrics 2"

    asyncio.run(main())


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
    assert endpoint.caller.sides() == ["prefill", "decode"]


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
