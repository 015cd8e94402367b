"""Hundreds of wrong requests, which Baton refuses as a plain vLLM server does, or by name."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeCompletionRequest,
)

from tests.support.load.malformed_requests import corpus
from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.vllm_server import VllmServer, post

pytestmark = pytest.mark.timeout(400)

MODEL = "tiny"
SEED = 20261129
BYTES_IN_FLIGHT = 128 << 10
BODY_TIMEOUT_S = 6.0
TOKENIZE_LENGTH = 1000
JSON = {"Content-Type": "application/json"}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "The sea", "max_tokens": 2}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "The sea"}],
    "max_tokens": 2,
}
ROUTES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "/v1/completions": (CompletionRequest, COMPLETION, 250),
    "/v1/chat/completions": (ChatCompletionRequest, CHAT, 250),
    "/tokenize": (TokenizeCompletionRequest, {"model": MODEL, "prompt": "The sea"}, 20),
    "/detokenize": (DetokenizeRequest, {"model": MODEL, "tokens": [5, 6]}, 20),
}


@dataclass(frozen=True)
class Sent:
    """One request."""

    path: str
    content: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What came of it; the status of a stream that is nothing but an error is the error's."""

    status: int
    text: str

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.text.removeprefix("data: ").partition("\n\n")[0])["error"])


RAW = [
    Sent("/v1/completions", content, headers)
    for content, headers in [
        (b"{", JSON),
        (b"", JSON),
        (b"null", JSON),
        (b'"text"', JSON),
        (b'{"model": "tiny", "prompt": "\xff"}', JSON),
        (b'{"model": "tiny", "prompt": ' + b"9" * 5000 + b"}", JSON),
        (b'{"model": "tiny", "prompt": "x", "a": ' + b"[" * 5000 + b"]" * 5000 + b"}", JSON),
        (b'{"model": "tiny", "prompt": "x", "a": ' + b"[" * 900 + b"]" * 900 + b"}", JSON),
        (b'{"model": "tiny", "prompt": "x"}', {"Content-Type": "text/plain"}),
        (b'{"model": "tiny", "prompt": "x"}', {}),
        (json.dumps(COMPLETION).encode(), {**JSON, "X-Request-Id": "\xff\xfe"}),
        (json.dumps(COMPLETION).encode(), {**JSON, "X-Session-Id": "\xff"}),
        (json.dumps(COMPLETION).encode(), {**JSON, "Serve-Multiplexed-Model-Id": "\xff"}),
        (json.dumps(COMPLETION).encode(), {**JSON, "X-Vllm-Priority": "9" * 40}),
        (json.dumps(COMPLETION).encode(), {**JSON, "User-Agent": "\xff"}),
    ]
]
HIDDEN: dict[str, Any] = {
    "prompt_logprobs": 0,
    "vllm_xargs": {"kv_transfer_params": "x"},
}
"""What the engine would take for a ticket, in a request that goes to decode alone."""
HIDING = [
    Sent("/v1/completions", json.dumps({**COMPLETION, **HIDDEN}).encode(), JSON),
    Sent("/v1/chat/completions", json.dumps({**CHAT, **HIDDEN}).encode(), JSON),
]


def requests() -> list[Sent]:
    """The same ones at every run."""
    made = [
        Sent(path, json.dumps(body).encode(), JSON)
        for path, (model, good, count) in ROUTES.items()
        for body in corpus(model, good, count, SEED)
    ]
    return [*made, *RAW, *HIDING]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("plain") / "server.log"
    arguments = ["--dtype", "float32", "--max-model-len", "256", "--block-size", "32"]
    with VllmServer(tiny_model, arguments, log) as server:
        yield server


@pytest.fixture(scope="module")
def app(
    tiny_model: Path, plain: VllmServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("app")
    config = write_config(
        folder,
        model=str(tiny_model),
        model_id=MODEL,
        engine={"max_model_len": 256},
        router={
            "max_body_bytes": BYTES_IN_FLIGHT,
            "max_bytes_in_flight": BYTES_IN_FLIGHT,
            "body_timeout_s": BODY_TIMEOUT_S,
            "max_tokenize_length": TOKENIZE_LENGTH,
        },
    )
    with BatonApp(config, folder / "up.log") as running:
        plain.wait()
        yield running


def ask(url: str, sent: Sent) -> Answer:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", sent.path, sent.content, sent.headers)
        response = connection.getresponse()
        answer = Answer(response.status, response.read().decode())
    finally:
        connection.close()
    if answer.text.startswith('data: {"error"'):
        return Answer(int(answer.error["code"]), answer.text)
    return answer


def ask_all(url: str, everything: list[Sent]) -> list[Answer]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda sent: ask(url, sent), everything))


def as_right(our: Answer, their: Answer) -> bool:
    """Whether it is refused if the plain server refuses it, and if so in OpenAI's form.

    The field is named, unless it is the engine that refuses and does not say which.
    """
    if our.status == 200:
        return not 400 <= their.status < 500
    if not 400 <= our.status < 500:
        return False
    error = our.error
    in_form = set(error) == {"message", "type", "param", "code"} and error["code"] == our.status
    if not error["param"] and not 400 <= their.status < 500:
        return False
    named = error["param"] or error["message"] == their.error["message"]
    return bool(in_form and error["message"] and named)


def essence(answer: dict[str, Any]) -> Any:
    return answer["choices"], answer["usage"]


def test_what_a_plain_server_refuses_is_refused_and_leaves_nothing(
    app: BatonApp, plain: VllmServer
) -> None:
    good = {**COMPLETION, "prompt": "The quick brown fox " * 8, "max_tokens": 12, "temperature": 0}
    before = post(f"{app.url}/v1/completions", good)
    everything = requests()

    ours = ask_all(app.url, everything)
    theirs = ask_all(plain.url, everything)

    wrong = [
        f"{sent.path} {sent.content[:300]!r} {sent.headers}\n  {our}\n  plain: {their}"
        for sent, our, their in zip(everything, ours, theirs, strict=True)
        if not as_right(our, their)
    ]
    assert not wrong, "\n".join(wrong)
    refused = sum(answer.status != 200 for answer in ours)
    assert refused > len(everything) // 3  # or the corpus is too tame

    assert essence(post(f"{app.url}/v1/completions", good)) == essence(before)
    deadline = time.monotonic() + 10
    while any(
        worker["unfinished_requests"] or worker["pinned_blocks"]
        for side in app.status().values()
        for worker in side
    ):
        assert time.monotonic() < deadline, app.status()
        time.sleep(0.2)


def _engines(app: BatonApp) -> set[tuple[str, str]]:
    return {
        (worker["engine_id"], worker["replica_id"])
        for side in app.status().values()
        for worker in side
    }


def _said(content: Any, **more: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**COMPLETION, **HIDDEN}, "vllm_xargs.kv_transfer_params"),
        ("/v1/chat/completions", {**CHAT, **HIDDEN}, "vllm_xargs.kv_transfer_params"),
        ("/v1/chat/completions", _said([{"type": "smell"}]), "messages.0.content.0.text"),
        ("/v1/chat/completions", _said([{"text": "a"}]), "messages.0.content.0.type"),
        ("/v1/chat/completions", _said("a", tool_calls=5), "messages.0.tool_calls"),
        ("/v1/chat/completions", _said("a\ud800"), "messages.0.content"),
        ("/v1/completions", {**COMPLETION, "prompt": "a\ud800"}, "prompt"),
        ("/v1/completions", {**COMPLETION, "stop": ["s"] * 200}, "stop"),
        ("/detokenize", {"model": MODEL, "tokens": [10**12]}, "tokens.0"),
        ("/tokenize", {"model": MODEL, "prompt": "x" * (TOKENIZE_LENGTH + 1)}, "prompt"),
        ("/detokenize", {"model": MODEL, "tokens": [5] * (TOKENIZE_LENGTH + 1)}, "tokens"),
    ],
    ids=[
        *("ticket", "ticket in a chat", "kind of part", "part of no kind", "tool calls"),
        *("half a character in a chat", "half a character", "stops", "token"),
        *("long text", "many tokens"),
    ],
)
def test_what_engines_must_not_see_is_refused_by_name(
    app: BatonApp, path: str, body: dict[str, Any], param: str
) -> None:
    before = _engines(app)

    answer = ask(app.url, Sent(path, json.dumps(body).encode(), JSON))

    assert answer.status == 400, answer.text
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"
    good = post(f"{app.url}/v1/completions", COMPLETION)
    assert good["usage"]["completion_tokens"] == 2
    assert _engines(app) == before


class HalfSent:
    """A request whose body has not come whole yet; a context manager."""

    def __init__(self, url: str, content: bytes, sent: int) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._rest = content[sent:]
        self._connection.putrequest("POST", "/v1/completions")
        for name, value in {**JSON, "Content-Length": str(len(content))}.items():
            self._connection.putheader(name, value)
        self._connection.endheaders(content[:sent])

    def __enter__(self) -> HalfSent:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def send_the_rest(self) -> None:
        self._connection.send(self._rest)

    def answer(self) -> Answer:
        response = self._connection.getresponse()
        return Answer(response.status, response.read().decode())


def _padded(size: int) -> bytes:
    """A good request of so many bytes."""
    return json.dumps(COMPLETION).encode().ljust(size)


def test_a_body_that_does_not_come_is_not_waited_for(app: BatonApp) -> None:
    start = time.monotonic()
    with HalfSent(app.url, _padded(500), 100) as client:
        answer = client.answer()
    assert answer.status == 408
    assert answer.error["param"] == "body"
    assert BODY_TIMEOUT_S - 0.5 < time.monotonic() - start < BODY_TIMEOUT_S + 5


def test_bodies_in_flight_are_bounded_and_make_room_again(app: BatonApp) -> None:
    size = BYTES_IN_FLIGHT * 3 // 4
    other = Sent("/v1/completions", _padded(size), JSON)
    with HalfSent(app.url, _padded(size), size - 100) as client:
        deadline = time.monotonic() + BODY_TIMEOUT_S / 2
        while (refused := ask(app.url, other)).status == 200:  # until the half is there
            assert time.monotonic() < deadline
        client.send_the_rest()
        served = client.answer()
    assert refused.status == 429
    assert refused.error["param"] == "body"
    assert refused.error["type"] == "rate_limit_error"
    assert served.status == 200, served.text
    assert ask(app.url, other).status == 200
