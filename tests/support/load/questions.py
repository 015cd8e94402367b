"""Keeps requests with known answers in flight against an application, and says how each ended."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

STUCK_S = 60.0
"""A request without an end after so long counts as one that has none."""


class Ended(StrEnum):
    """How a request ended, as its client sees it."""

    OK = "ok"
    REFUSED = "refused"
    """With an error in OpenAI's form: a status, or an event in the stream."""
    WRONG = "wrong"
    """With another answer than a single engine gives."""
    BROKEN = "broken"
    """Early: a connection or a stream that broke, or an error that is not in OpenAI's form."""
    STUCK = "stuck"
    """Not at all in 60 s."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its one right answer.

    Attributes:
        prompt: token ids.
        text: what one engine alone answers, greedily, in float32.
        usage: what an undisturbed answer says about its tokens; empty while that is not known.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    text: str
    usage: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """One request: monotonic times, how it ended and what there is to say about it."""

    began_s: float
    ended_s: float
    ended: Ended
    detail: str

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


class Load:
    """``in_flight`` clients, each asking one question after the other until :meth:`stop`.

    Every other answer is streamed. A client that was turned away waits a moment, as real ones do.
    """

    def __init__(self, url: str, model: str, questions: Sequence[Question], in_flight: int) -> None:
        self._host = url.removeprefix("http://")
        self._model = model
        self._questions = itertools.cycle(questions)
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._results: list[Result] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to ask."""
        for number in range(self._in_flight):
            thread = threading.Thread(target=self._run, args=(number,), name="load", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> list[Result]:
        """Ask nothing more and wait until every question is answered or has to count as stuck."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * STUCK_S)
        return self.results()

    def results(self) -> list[Result]:
        """What ended so far."""
        with self._lock:
            return list(self._results)

    def wait(self, enough: Callable[[list[Result]], bool], timeout_s: float) -> bool:
        """Wait until the results are enough; False if they were not in time."""
        deadline = time.monotonic() + timeout_s
        while not enough(self.results()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _run(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._stop.is_set():
                return
            with self._lock:
                question = next(self._questions)
            result = timed(self._host, self._model, question, streamed=turn % 2 == 0)
            with self._lock:
                self._results.append(result)
            if result.ended is not Ended.OK:
                self._stop.wait(0.2)


def timed(host: str, model: str, question: Question, *, streamed: bool) -> Result:
    """:func:`ask`, with the time it took."""
    began_s = time.monotonic()
    ended, detail = ask(host, model, question, streamed=streamed)
    return Result(began_s, time.monotonic(), ended, detail)


def ask(host: str, model: str, question: Question, *, streamed: bool) -> tuple[Ended, str]:
    """Ask one question and judge the answer."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": streamed,
    }
    if streamed:
        body["stream_options"] = {"include_usage": True}
    deadline = time.monotonic() + STUCK_S
    connection = http.client.HTTPConnection(host, timeout=STUCK_S)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            return refusal(response)
        if not streamed:
            answer = json.loads(response.read())
            return _judged(question, answer["choices"][0]["text"], answer["usage"])
        return _read_stream(response, question, deadline)
    except TimeoutError as error:
        return Ended.STUCK, f"no end in {STUCK_S:.0f} s: {error}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Ended.BROKEN, f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def _read_stream(
    response: http.client.HTTPResponse, question: Question, deadline: float
) -> tuple[Ended, str]:
    texts: list[str] = []
    usage: dict[str, Any] | None = None
    error = ""
    while line := response.readline():
        if time.monotonic() > deadline:
            return Ended.STUCK, "the stream goes on and on"
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return (Ended.REFUSED, error) if error else _judged(question, "".join(texts), usage)
        if not data:
            continue
        event = json.loads(data)
        if "error" in event:
            error = f"in the stream: {event['error']['message']}"
        texts += [choice["text"] for choice in event.get("choices", ())]
        usage = event.get("usage") or usage
    return Ended.BROKEN, f"the stream ended without [DONE] after {len(texts)} events"


def _judged(question: Question, text: str, usage: dict[str, Any] | None) -> tuple[Ended, str]:
    if text != question.text:
        return Ended.WRONG, f"{text!r} instead of {question.text!r}"
    # A stream leaves out what a whole answer says to be null.
    said = {name: value for name, value in (usage or {}).items() if value is not None}
    if not said or (question.usage and said != dict(question.usage)):
        return Ended.WRONG, f"usage {usage} instead of {dict(question.usage)}"
    return Ended.OK, json.dumps(said)


def refusal(response: http.client.HTTPResponse) -> tuple[Ended, str]:
    """Judge an answer that is none."""
    status, body = response.status, response.read()
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return Ended.BROKEN, f"status {status} without an error in OpenAI's form: {body[:200]!r}"
    if status in (429, 503) and not int(response.getheader("Retry-After") or 0) > 0:
        return Ended.BROKEN, f"status {status} without Retry-After: {message}"
    return Ended.REFUSED, f"status {status}: {message}"
