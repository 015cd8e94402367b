from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from serve_app.api_keys import ApiKeys
from serve_app.edge.body_limits import BodyLimits
from serve_app.ingress.cache_salt import salt_of_key
from serve_app.ingress.guard import Guard

KEYS = ("${GUARD_TEST_KEYS}",)
KEYS_SHOWN = ("first-key", "second-key")
LIMIT = 10
LIMITS = BodyLimits(max_body_bytes=LIMIT, max_bytes_in_flight=25, timeout_s=0.2)


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_TEST_KEYS", "\n".join(KEYS_SHOWN))


class App:
    """Reads whole requests, and one message more, as an app does that watches for the client."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.after: list[Message] = []
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.after.append(message)
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


class Exchange:
    """One request through the guard.

    Attributes:
        unread: messages from the client, or what Ray raises in place of one, that nobody asked for.
    """

    def __init__(
        self,
        messages: list[Message | RayError],
        *,
        headers: dict[str, str] | None = None,
        path: str = "/v1/completions",
        keys: tuple[str, ...] = (),
        **scope: Any,
    ) -> None:
        self.app = App()
        self.sent: list[Message] = []
        self.unread: list[Message | RayError] = [*messages, {"type": "http.disconnect"}]
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        guard = Guard(self.app, api_keys=ApiKeys(keys), limits=LIMITS)
        asyncio.run(
            guard(
                {"type": "http", "path": path, "headers": raw, **scope}, self._receive, self._send
            )
        )

    async def _receive(self) -> Message:
        message = self.unread.pop(0)
        if isinstance(message, RayError):
            raise message
        return message

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        return error

    def header(self, name: str) -> str:
        headers: dict[bytes, bytes] = dict(self.sent[0]["headers"])
        return headers[name.encode()].decode()


def body(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [
        {"type": "http.request", "body": part, "more_body": index < last}
        for index, part in enumerate(parts)
    ]


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer first"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Bearer First-Key"},
        {"authorization": "Bearer first-key second-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"authorization": "Bearer ключ"},
        {"x-api-key": "first-key"},
    ],
)
def test_without_a_valid_key_nothing_passes(headers: dict[str, str]) -> None:
    exchange = Exchange(body(b"hello"), headers=headers, keys=KEYS)

    assert exchange.status == 401
    assert exchange.header("www-authenticate") == "Bearer"
    assert exchange.error["type"] == "authentication_error"
    assert exchange.error["code"] == 401
    assert exchange.app.scopes == []
    assert len(exchange.unread) == 2, "the body of a stranger was read"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer first-key"),
        ("Authorization", "Bearer second-key"),
        ("authorization", "bearer  first-key "),
        ("AUTHORIZATION", "BEARER second-key"),
    ],
)
def test_valid_key_passes(name: str, value: str) -> None:
    exchange = Exchange(body(b"hello"), headers={name: value}, keys=KEYS)

    assert exchange.status == 200
    assert exchange.app.bodies == [b"hello"]


def test_nothing_behind_the_guard_sees_an_accepted_key() -> None:
    headers = {"Authorization": "Bearer first-key", "x-other": "stays"}
    exchange = Exchange(body(b"hello"), headers=headers, keys=KEYS)

    (scope,) = exchange.app.scopes
    assert scope["headers"] == [(b"x-other", b"stays")]


def test_what_stands_for_the_key_is_told_behind_the_guard() -> None:
    told = []
    for key in KEYS_SHOWN:
        state = {"of": "the server"}
        exchange = Exchange(
            body(b"hello"), headers={"authorization": f"Bearer {key}"}, keys=KEYS, state=state
        )
        (scope,) = exchange.app.scopes
        told.append(scope["state"].pop("salt_of_key"))
        assert scope["state"] == state == {"of": "the server"}
    assert told == [salt_of_key(key.encode()) for key in KEYS_SHOWN]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer first-key"}])
def test_nobody_is_told_where_no_key_is_asked_for(headers: dict[str, str]) -> None:
    for exchange in (
        Exchange(body(b""), headers=headers, path="/health", keys=KEYS),
        Exchange(body(b""), headers=headers),
    ):
        (scope,) = exchange.app.scopes
        assert "salt_of_key" not in scope.get("state", {})


def test_without_keys_anybody_may_ask() -> None:
    assert Exchange(body(b"hello")).status == 200


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key(path: str) -> None:
    assert Exchange(body(b""), path=path, keys=KEYS).status == 200


@pytest.mark.parametrize("path", ["/health/", "/healthy", "/v1/health", "/v1/models", "/"])
def test_other_paths_need_one(path: str) -> None:
    assert Exchange(body(b""), path=path, keys=KEYS).status == 401


@pytest.mark.parametrize(
    ("path", "status"), [("/llm/health", 200), ("/llm/metrics", 200), ("/llm/v1/models", 401)]
)
def test_paths_under_a_route_prefix(path: str, status: int) -> None:
    assert Exchange(body(b""), path=path, root_path="/llm", keys=KEYS).status == status


# ---- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["11", "1000", "9" * 30, "9" * 5000, "0" * 30 + "11"])
def test_body_that_says_it_is_too_long_is_not_read(length: str) -> None:
    exchange = Exchange(body(b"x" * 11), headers={"content-length": length})

    assert exchange.status == 413
    assert exchange.error["param"] == "body"
    assert exchange.error["type"] == "invalid_request_error"
    assert "10 bytes" in exchange.error["message"]
    assert exchange.app.scopes == []
    assert len(exchange.unread) == 2


@pytest.mark.parametrize("length", [None, "5", "-1", "many", "", "1e1"])
@pytest.mark.parametrize(
    "parts",
    [(b"x" * 11,), (b"x" * 10, b"y"), (b"x",) * 11, (b"x" * 6, b"x" * 6, b"never read")],
)
def test_body_is_counted_whatever_it_says(length: str | None, parts: tuple[bytes, ...]) -> None:
    headers = {} if length is None else {"content-length": length}
    exchange = Exchange(body(*parts), headers=headers)

    assert exchange.status == 413
    assert exchange.app.scopes == []


def test_reading_ends_where_the_limit_is_passed() -> None:
    exchange = Exchange(body(b"x" * 6, b"x" * 6, b"x" * 6))

    assert [message.get("body") for message in exchange.unread] == [b"x" * 6, None]


@pytest.mark.parametrize(
    "parts",
    [(b"",), (b"x" * 10,), (b"x" * 5, b"y" * 5), (b"", b"ab", b"", b"cd", b"")],
)
def test_body_within_the_limit_arrives_as_it_was_sent(parts: tuple[bytes, ...]) -> None:
    exchange = Exchange(body(*parts), headers={"content-length": str(len(b"".join(parts)))})

    assert exchange.status == 200
    assert exchange.app.bodies == [b"".join(parts)]


def test_client_that_leaves_after_its_body_is_noticed() -> None:
    exchange = Exchange(body(b"hello"))

    assert exchange.app.after == [{"type": "http.disconnect"}]
    assert exchange.unread == []


def test_client_that_leaves_within_its_body_is_noticed() -> None:
    exchange = Exchange([{"type": "http.request", "body": b"he", "more_body": True}])

    assert exchange.app.after == [{"type": "http.disconnect"}]
    assert exchange.app.bodies == []
    assert exchange.sent == []


@pytest.mark.parametrize(
    "lost", [TaskCancelledError(), ActorDiedError(), ActorUnavailableError("away", None)]
)
def test_what_ray_says_of_a_lost_client_is_a_disconnect(lost: RayError) -> None:
    exchange = Exchange([*body(b"hello"), lost])
    within = Exchange([{"type": "http.request", "body": b"he", "more_body": True}, lost])

    assert exchange.app.after == [{"type": "http.disconnect"}]
    assert exchange.status == 200
    assert within.app.after == [{"type": "http.disconnect"}]
    assert within.sent == []


def test_lifespan_passes_untouched() -> None:
    app = App()
    scope: Scope = {"type": "lifespan"}

    async def main() -> None:
        async def receive() -> Message:
            raise AssertionError("the guard read a lifespan message")

        async def send(message: Message) -> None:
            raise AssertionError("the guard sent a lifespan message")

        await Guard(app, api_keys=ApiKeys(KEYS), limits=LIMITS)(scope, receive, send)

    asyncio.run(main())
    assert app.scopes == [scope]


# ---- slow and many bodies ------------------------------------------------------------------------


class Clients:
    """Several requests through one guard, whose app answers when it is told to."""

    def __init__(self) -> None:
        self.answer = asyncio.Event()
        self.let_in = 0
        self._guard = Guard(self._app, api_keys=ApiKeys(()), limits=LIMITS)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.let_in += 1
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def send(self, messages: list[Message]) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the answer; a client that has said all it says stays."""
        sent: list[Message] = []
        left = list(messages)

        async def receive() -> Message:
            if left:
                return left.pop(0)
            await asyncio.Event().wait()
            raise AssertionError("never")

        async def take(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/completions", "headers": []}
        await self._guard(scope, receive, take)
        return sent[0]["status"], dict(sent[0]["headers"])


def test_body_that_does_not_come_whole_is_not_waited_for() -> None:
    async def main() -> None:
        clients = Clients()
        half: list[Message] = [{"type": "http.request", "body": b"half", "more_body": True}]

        answers = await asyncio.gather(*(clients.send(half) for _ in range(6)))

        assert [status for status, _ in answers] == [408] * 6
        assert clients.let_in == 0

    asyncio.run(main())


def test_bodies_in_flight_are_bounded_until_their_answers_have_ended() -> None:
    async def main() -> None:
        clients = Clients()
        within = [asyncio.ensure_future(clients.send(body(b"x" * 10))) for _ in range(2)]
        await asyncio.sleep(0)

        status, headers = await clients.send(body(b"x" * 10))

        assert (status, headers[b"retry-after"]) == (429, b"1")
        small = asyncio.ensure_future(clients.send(body(b"x" * 5)))
        clients.answer.set()
        assert [status for status, _ in await asyncio.gather(*within, small)] == [200] * 3
        # Nothing is left of those that were answered, nor of the one that was refused.
        again = [clients.send(body(b"x" * 10)) for _ in range(2)]
        assert [status for status, _ in await asyncio.gather(*again)] == [200] * 2

    asyncio.run(main())
