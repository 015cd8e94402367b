"""Requests that look harmless, and one that is not."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.support.chaos.app import MODEL, ChaosApp, kill
from tests.support.chaos.fault import Began
from tests.support.chaos.processes import engine_of_held
from tests.support.load.questions import STUCK_S, Ended, Question, Result, refusal

_EQUAL, _EQUAL_REQUESTS = 5, 8
_BEYOND_THE_POOL = 80
_LONG_IDS, _LONG_IDS_AT_ONCE, _LONG_ID_CHARS = 60, 8, 4000
_KILLER, _KILLER_SENT, _KILLED_AT_MOST = "killer", 5, 2
_KILLER_PROMPT = Question(tuple(range(3, 103)), max_tokens=8, text="it is never answered")
"""Nobody else asks it: those of the same content share their fate."""


def equal_prompts(ring: ChaosApp, began: Began) -> None:
    """Requests each of which has one prompt several times: every one is read, none is left."""
    with _nothing_wasted(ring):
        began()
        for question in ring.questions[-_EQUAL_REQUESTS:]:
            began.own.append(_ask(ring, [question] * _EQUAL))


def prompts_beyond_the_pool(ring: ChaosApp, began: Began) -> None:
    """More tokens in one request than a prefill engine has blocks for."""
    longest = ring.questions[-4:]
    with _nothing_wasted(ring):
        began()
        questions = [longest[number % len(longest)] for number in range(_BEYOND_THE_POOL)]
        began.own.append(_ask(ring, questions))


def long_request_ids(ring: ChaosApp, began: Began) -> None:
    """Ids that no ticket would hold; they come back as they were."""

    def ask(number: int) -> Result:
        question = ring.questions[number % len(ring.questions)]
        return _ask(ring, [question], request_id=f"{number}-" + "x" * _LONG_ID_CHARS)

    with _nothing_wasted(ring):
        began()
        with ThreadPoolExecutor(_LONG_IDS_AT_ONCE) as pool:
            began.own = list(pool.map(ask, range(_LONG_IDS)))


def killer_prompt(ring: ChaosApp, began: Began) -> None:
    """Whatever prefill engine is given it dies; its client sends it again and again.

    It gets 500, and costs two engines in all; everybody else is served meanwhile.
    """
    over, killed = threading.Event(), list[int]()
    killing = threading.Thread(target=_kill_whoever_gets_it, args=(ring, over, killed), daemon=True)
    began()
    killing.start()
    try:
        for _ in range(_KILLER_SENT):
            began.own.append(_ask(ring, [_KILLER_PROMPT], user=_KILLER))
    finally:
        over.set()
        killing.join()
    if bad := [one for one in began.own if not one.detail.startswith("status 500")]:
        raise RuntimeError(f"not refused as it should be: {bad}")
    if not 0 < len(killed) <= _KILLED_AT_MOST:
        raise RuntimeError(f"it killed {len(killed)} engines")


def _kill_whoever_gets_it(ring: ChaosApp, over: threading.Event, killed: list[int]) -> None:
    while not over.is_set():
        armed = ring.points.arm("prefill.computing", _KILLER)
        while not over.is_set():
            try:
                armed.wait(0.2)
            except TimeoutError:
                continue
            pid = engine_of_held(ring, armed)
            kill(pid)
            killed.append(pid)
            break
        armed.release()


@contextmanager
def _nothing_wasted(ring: ChaosApp) -> Iterator[None]:
    """No prompt is computed twice, and no offer ends by expiry."""
    before = _wasted(ring)
    yield
    if (wasted := _wasted(ring)) != before:
        raise RuntimeError(f"wasted: {wasted}, and {before} before")


def _wasted(ring: ChaosApp) -> tuple[int, int]:
    recomputed = ring.app.totals("decode").get("recomputed_tokens", 0)
    return recomputed, ring.app.totals("prefill").get("owner_expired", 0)


def _ask(
    ring: ChaosApp, questions: Sequence[Question], *, request_id: str = "", user: str = ""
) -> Result:
    """Asks questions in one request and judges the answers."""
    prompts = [list(question.prompt) for question in questions]
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "max_tokens": questions[0].max_tokens,
        "temperature": 0,
    }
    if user:
        body["user"] = user
    headers = {"Content-Type": "application/json"}
    if request_id:
        headers["X-Request-Id"] = request_id
    began_s = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", ring.app.port, timeout=STUCK_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        ended, detail = _judged(connection.getresponse(), questions, request_id)
    except TimeoutError as error:
        ended, detail = Ended.STUCK, f"no end in {STUCK_S:.0f} s: {error}"
    finally:
        connection.close()
    return Result(began_s, time.monotonic(), ended, detail)


def _judged(
    response: http.client.HTTPResponse, questions: Sequence[Question], request_id: str
) -> tuple[Ended, str]:
    if response.status != 200:
        return refusal(response)
    answer = json.loads(response.read())
    texts = [choice["text"] for choice in answer["choices"]]
    if texts != [question.text for question in questions]:
        return Ended.WRONG, f"{texts} instead of {[question.text for question in questions]}"
    if request_id and answer["id"] != f"cmpl-{request_id}":
        return Ended.WRONG, f"the answer is called {answer['id'][:50]}"
    return Ended.OK, ""
