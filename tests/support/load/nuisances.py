"""Clients that send anything: right, wrong and broken requests, and leave when they please."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ANSWERED_WITHIN_S = 30.0
ALLOWED = frozenset({*range(200, 500), 501, 503, 505})
"""503 is a refusal under load. 501 and 505 are Serve's proxy's own, for what HTTP/1.1 lacks."""

_HEADERS: list[tuple[str, bytes]] = [
    ("x-request-id", b"r" * 3000),
    ("x-request-id", b"\xff\xfe"),
    ("x-vllm-priority", b"9" * 400),
    ("x-vllm-priority", b"soon"),
    ("content-type", b"text/plain"),
    ("content-type", b"application/json; charset=utf-16"),
    ("authorization", b"Bearer \xff"),
    ("accept", b"image/png"),
    ("traceparent", b"00-zz-zz-zz"),
    ("cookie", b"a=" + b"b" * 4000),
    ("expect", b"100-continue"),
    ("origin", b"http://elsewhere"),
]

_VALUES: list[Any] = [
    *(None, True, "", "x", "\ud800", 0, -1, 1.5, 1e308, 1 << 31, 1 << 63, 10**30),
    *([], [[]], [None], [-1], ["x"], [1 << 40], {}, {"type": "smell"}, {"a": {"a": {"a": []}}}),
]

_FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "logprobs"),
    *("top_logprobs", "prompt_logprobs", "logit_bias", "echo", "stream", "stream_options"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "tools"),
    *("tool_choice", "response_format", "structured_outputs", "truncate_prompt_tokens"),
    *("allowed_token_ids", "priority", "cache_salt", "vllm_xargs", "kv_transfer_params", "user"),
    *("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "request_id", "suffix"),
]

_PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request on its way.

    Attributes:
        kind: which nuisance, for the report.
        content: the bytes of the whole request.
        leaves_after: bytes of the answer after which the client closes; None: it stays.
        pause_at: byte of the request at which the client rests for a moment, or goes away.
        goes: whether it goes away there.
    """

    kind: str
    content: bytes
    leaves_after: int | None = None
    pause_at: int | None = None
    goes: bool = False


class Nuisance:
    """Makes requests from a seed.

    Args:
        model: the served one.
        chance: source of everything.
    """

    def __init__(self, model: str, chance: random.Random) -> None:
        self._model = model
        self._chance = chance
        self._kinds: list[Callable[[], Sent]] = [
            self._valid,
            self._valid_and_left,
            self._changed,
            self._changed,
            self._cut,
            self._slow,
            self._headed,
            self._noise,
        ]

    def next(self) -> Sent:
        """The next request."""
        return self._chance.choice(self._kinds)()

    # ------------------------------------------------------------------------------------------

    def _body(self) -> tuple[str, dict[str, Any]]:
        chance = self._chance
        body: dict[str, Any] = {"model": self._model, "max_tokens": chance.randint(1, 12)}
        length = chance.choice([1, 5, 40, 120])
        prompt = chance.choices(range(3, 200), k=length)
        body |= chance.choice(
            [{}, {"n": 2}, {"seed": 1}, {"logprobs": 1}, {"stop": ["a"]}, {"temperature": 0}]
        )
        body["stream"] = chance.random() < 0.5
        several = chance.random() < 0.2
        body["prompt"] = [prompt, prompt, prompt[:1]] if several else prompt
        return "/v1/completions", body

    def _valid(self) -> Sent:
        path, body = self._body()
        return Sent("valid", _request(path, json.dumps(body).encode()))

    def _valid_and_left(self) -> Sent:
        path, body = self._body()
        content = _request(path, json.dumps({**body, "max_tokens": 100}).encode())
        return Sent("left", content, leaves_after=self._chance.choice([0, 1, 300]))

    def _changed(self) -> Sent:
        """One or two fields with any value, at any endpoint."""
        chance = self._chance
        path, body = self._body()
        for _ in range(chance.randint(1, 2)):
            body[chance.choice(_FIELDS)] = chance.choice(_VALUES)
        if chance.random() < 0.4:
            path = chance.choice(_PATHS)
            part = chance.choice(_VALUES)
            body["messages"] = [
                {"role": chance.choice(["user", "system", "tool"]), "content": part}
            ]
        return Sent("changed", _request(path, json.dumps(body).encode()))

    def _cut(self) -> Sent:
        """The client goes away in the middle of its request."""
        content = self._valid().content
        return Sent("cut", content, pause_at=self._chance.randrange(1, len(content)), goes=True)

    def _slow(self) -> Sent:
        """The client rests in the middle of its request."""
        content = self._valid().content
        return Sent("slow", content, pause_at=self._chance.randrange(1, len(content)))

    def _headed(self) -> Sent:
        path, body = self._body()
        headers = dict(self._chance.sample(_HEADERS, k=2))
        return Sent("headed", _request(path, json.dumps(body).encode(), headers))

    def _noise(self) -> Sent:
        """A body that is no JSON, or not what its length says."""
        _, body = self._body()
        text = json.dumps(body).encode()
        at = self._chance.randrange(len(text))
        damaged = self._chance.choice(
            [
                text[:at],
                text[:at] + bytes([self._chance.randrange(256)]) + text[at + 1 :],
                b"[" * 900 + b"]" * 900,
                b'{"prompt": ' + b"9" * 5000 + b"}",
                b"",
                b"null",
                b"\xef\xbb\xbf" + text,
            ]
        )
        return Sent("noise", _request("/v1/completions", damaged))


class Nuisances:
    """Sends so many of them a second until :meth:`stop`, never more than ``in_flight`` at once.

    Args:
        url: of the application.
        rate: a second, while fewer than ``in_flight`` are waited for.
    """

    def __init__(self, url: str, made: Nuisance, *, rate: float, in_flight: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._made = made
        self._rate = rate
        self._lock = threading.Lock()
        self._due_s = time.monotonic()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(in_flight)]
        self.statuses: Counter[str] = Counter()
        self.bad: list[str] = []

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send nothing more and wait for what is under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * ANSWERED_WITHIN_S)

    def _run(self) -> None:
        while (sent := self._take()) is not None:
            try:
                status = self._send(sent)
            except TimeoutError:
                self._count(sent, "no answer")
            except (OSError, http.client.HTTPException):
                self._count(sent, "closed")
            else:
                self._count(sent, status)

    def _take(self) -> Sent | None:
        with self._lock:
            self._due_s = max(self._due_s, time.monotonic() - 1.0) + 1.0 / self._rate
            wait_s, sent = self._due_s - time.monotonic(), self._made.next()
        return None if self._stop.wait(max(0.0, wait_s)) else sent

    def _send(self, sent: Sent) -> str:
        with socket.create_connection(self._address, timeout=ANSWERED_WITHIN_S) as connection:
            at = sent.pause_at or 0
            connection.sendall(sent.content[:at])
            if sent.goes:
                return "gone"
            if at:
                time.sleep(0.3)
            connection.sendall(sent.content[at:])
            if sent.leaves_after is not None:
                if sent.leaves_after:
                    connection.recv(sent.leaves_after)
                return "gone"
            response = http.client.HTTPResponse(connection)
            response.begin()
            response.read()
            return str(response.status)

    def _count(self, sent: Sent, what: str) -> None:
        with self._lock:
            self.statuses[f"{sent.kind} {what}"] += 1
            if what == "no answer" or (what.isdigit() and int(what) not in ALLOWED):
                self.bad.append(f"{what}: {sent.content[:2000]!r}")


def _request(path: str, body: bytes, headers: dict[str, bytes] | None = None) -> bytes:
    lines = {"host": b"baton", "content-type": b"application/json", **(headers or {})}
    lines |= {"content-length": str(len(body)).encode(), "connection": b"close"}
    head = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in lines.items())
    return b"POST " + path.encode() + b" HTTP/1.1\r\n" + head + b"\r\n" + body
