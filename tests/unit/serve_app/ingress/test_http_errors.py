from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI, Query
from pydantic import BaseModel, ConfigDict, TypeAdapter, field_validator
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from deployments.errors import ServiceUnavailable
from serve_app.edge.error_body import error_body
from serve_app.ingress.http_errors import add_error_handlers

PROBLEMS: dict[str, Exception] = {
    "openai": OpenAIHTTPException(status_code=404, message="no such model", type="not_found_error"),
    "openai-odd-type": OpenAIHTTPException(status_code=408, message="too slow", type="Timeout"),
    "openai-named-after-class": OpenAIHTTPException(400, "bad input", type="ValueError"),
    "openai-unknown": OpenAIHTTPException(404, "no such model"),
    "vllm": VLLMValidationError("n must be at least 1, got 0.", parameter="n", value=0),
    "vllm-unknown": VLLMNotFoundError("The model `x` does not exist."),
    "busy": ServiceUnavailable("no decode replica", retry_after_s=4.4),
    "busy-soon": ServiceUnavailable("no decode replica", retry_after_s=0.1),
    "teapot": HTTPException(418, "short and stout", headers={"X-Pot": "tea"}),
    "limit": HTTPException(429, "slow down"),
    "bug": KeyError("secret internals"),
}


class Message(BaseModel):
    role: Literal["user", "system"]
    content: str


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[Message]
    temperature: float = 1.0
    query: str = ""

    @field_validator("temperature")
    @classmethod
    def _not_too_hot(cls, value: float) -> float:
        if value > 2:
            raise ValueError("temperature is above 2")
        return value


def make_app() -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/chat")
    async def chat(body: Body) -> dict[str, int]:
        return {"messages": len(body.messages)}

    @app.get("/search")
    async def search(limit: int = Query()) -> int:
        return limit

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise PROBLEMS[name]

    @app.get("/inner")
    async def inner() -> None:
        TypeAdapter(Body).validate_python({"messages": [], "query": 5})

    return app


def ask(method: str, path: str, **content: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **content)

    return asyncio.run(main())


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, checked to have OpenAI's form."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return error


GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def test_good_request_is_left_alone() -> None:
    response = ask("POST", "/chat", json=GOOD)

    assert response.status_code == 200
    assert response.json() == {"messages": 1}


# ---- requests that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", '{"messages": [}', "not json", '{"messages": []'])
def test_malformed_json(content: str) -> None:
    response = ask("POST", "/chat", content=content, headers={"content-type": "application/json"})

    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "body"
    assert error["message"].startswith("the body is not valid JSON")


@pytest.mark.parametrize("content", [None, b""])
def test_missing_body(content: bytes | None) -> None:
    error = error_of(ask("POST", "/chat", content=content), 400)

    assert error["param"] == "body"
    assert error["message"] == "Field required"


@pytest.mark.parametrize("body", [[], "text", 3])
def test_body_that_is_no_object(body: Any) -> None:
    assert error_of(ask("POST", "/chat", json=body), 400)["param"] == "body"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [*GOOD["messages"], {"role": "dog", "content": "wuff"}]}, "messages.1.role"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"query": 5}, "query"),
        ({"path": 1}, "path"),
        ({"body": 1}, "body"),
    ],
)
def test_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    error = error_of(ask("POST", "/chat", json={**GOOD, **change}), 400)

    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")


def test_own_words_of_a_validator_come_without_pydantics() -> None:
    error = error_of(ask("POST", "/chat", json={**GOOD, "temperature": 3}), 400)

    assert error["message"] == "temperature: temperature is above 2"


def test_missing_field_is_named() -> None:
    assert error_of(ask("POST", "/chat", json={}), 400)["param"] == "messages"


@pytest.mark.parametrize("path", ["/search", "/search?limit=many"])
def test_query_parameter_is_named(path: str) -> None:
    assert error_of(ask("GET", path), 400)["param"] == "limit"


def test_validation_inside_a_handler_is_the_requests_fault() -> None:
    error = error_of(ask("GET", "/inner"), 400)

    assert error["type"] == "invalid_request_error"
    assert "valid string" in error["message"]


def test_unknown_path_and_method() -> None:
    assert error_of(ask("GET", "/nowhere"), 404)["type"] == "not_found_error"
    wrong = ask("GET", "/chat")
    assert error_of(wrong, 405)["type"] == "invalid_request_error"
    assert wrong.headers["allow"] == "POST"


# ---- errors from further in ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "kind", "message"),
    [
        ("openai", 404, "not_found_error", "no such model"),
        ("openai-odd-type", 408, "server_error", "too slow"),
        ("openai-named-after-class", 400, "invalid_request_error", "bad input"),
        ("openai-unknown", 404, "not_found_error", "no such model"),
        ("busy", 503, "server_error", "no decode replica"),
        ("teapot", 418, "invalid_request_error", "short and stout"),
        ("limit", 429, "rate_limit_error", "slow down"),
    ],
)
def test_known_errors_keep_status_and_message(
    name: str, status: int, kind: str, message: str
) -> None:
    error = error_of(ask("GET", f"/raise/{name}"), status)

    assert error["type"] == kind
    assert error["message"] == message
    assert error["param"] is None


@pytest.mark.parametrize(
    ("name", "status", "kind", "param"),
    [
        ("vllm", 400, "invalid_request_error", "n"),
        ("vllm-unknown", 404, "not_found_error", None),
    ],
)
def test_refusals_of_vllm_keep_their_field(
    name: str, status: int, kind: str, param: str | None
) -> None:
    error = error_of(ask("GET", f"/raise/{name}"), status)

    assert error["type"] == kind
    assert error["param"] == param
    assert error["message"] == PROBLEMS[name].args[0]


@pytest.mark.parametrize(("name", "seconds"), [("busy", "4"), ("busy-soon", "1")])
def test_unavailable_says_when_to_try_again(name: str, seconds: str) -> None:
    response = ask("GET", f"/raise/{name}")

    error_of(response, 503)
    assert response.headers["retry-after"] == seconds


def test_headers_of_an_http_error_are_kept() -> None:
    assert ask("GET", "/raise/teapot").headers["x-pot"] == "tea"


def test_unexpected_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        response = ask("GET", "/raise/bug")

    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    (record,) = [item for item in caplog.records if item.name == "ray.serve"]
    assert "/raise/bug" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


# ---- the pieces ----------------------------------------------------------------------------------


def test_error_body_is_openais() -> None:
    assert error_body(404, "no such model", param="model") == {
        "error": {
            "message": "no such model",
            "type": "not_found_error",
            "param": "model",
            "code": 404,
        }
    }
    assert error_body(502, "x")["error"]["type"] == "server_error"
    assert error_body(400, "x", kind="own")["error"]["type"] == "own"
