"""Who may call the endpoint, and what its clients share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from serve_app.api_keys import ApiKeys
from serve_app.ingress.cache_salt import cache_salt, salt_of_key
from serve_app.ingress.endpoint import Ingress
from tests.support.scripted.ingress import (
    ANSWER,
    CHAT,
    CHATS,
    COMPLETION,
    COMPLETIONS,
    Endpoint,
    only_key,
)

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
