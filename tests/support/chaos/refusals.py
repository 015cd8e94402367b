"""Requests that must be turned away, and leave nothing behind."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.chaos.app import MAX_REQUESTS, MODEL, ChaosApp
from tests.support.chaos.clients import until_free
from tests.support.chaos.fault import Began
from tests.support.load.questions import Ended, Question, Result, refusal, timed

_FREE_WITHIN_S = 5.0
_HANDED_OVER_TOKENS = 64


def too_many_requests(ring: ChaosApp, began: Began) -> None:
    """Three times what is let in, at once: the rest gets 429, and costs no prefill."""
    questions = [one for one in ring.questions if len(one.prompt) >= _HANDED_OVER_TOKENS]
    asked = [questions[number % len(questions)] for number in range(3 * MAX_REQUESTS)]
    host, before = ring.app.url.removeprefix("http://"), _offers(ring)

    def ask(question: Question) -> Result:
        return timed(host, MODEL, question, streamed=False)

    began()
    with ThreadPoolExecutor(len(asked)) as pool:
        began.own = list(pool.map(ask, asked))
    until_free(ring, began, _FREE_WITHIN_S)
    _require_refused(began.own, "status 429")
    served = sum(one.ended is Ended.OK for one in began.own)
    if served < MAX_REQUESTS or (offered := _offers(ring) - before) != served:
        raise RuntimeError(f"{served} were served, for {offered} of them something was computed")


def bad_requests(ring: ChaosApp, began: Began) -> None:
    """Each gets a 4xx that names what is wrong; no engine sees any."""
    before = _offers(ring)
    began()
    for body, word in _BAD:
        content = body if isinstance(body, bytes) else json.dumps({**_GOOD, **body}).encode()
        began.own.append(_post(ring, content, word))
    until_free(ring, began, _FREE_WITHIN_S)
    if wrong := [one for one in began.own if one.ended is not Ended.REFUSED]:
        raise RuntimeError(f"not refused as they should be: {wrong}")
    _require_refused(began.own, "status 4")
    if _offers(ring) != before:
        raise RuntimeError("a bad request was computed")


_GOOD: dict[str, Any] = {"model": MODEL, "prompt": list(range(3, 103)), "max_tokens": 4}

_BAD: list[tuple[dict[str, Any] | bytes, str]] = [
    (b'{"model": ', "JSON"),
    (b'{"prompt": "' + b"x" * (17 << 20) + b'"}', "bytes"),
    ({"model": "another"}, "model"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": list(range(3, 203)) * 10}, "length"),
    ({"prompt": [1 << 40]}, "prompt.0"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"n": 1000}, "n:"),
    ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
]
"""Of a request, and the word by which its refusal names what is wrong."""


def _post(ring: ChaosApp, content: bytes, word: str) -> Result:
    began_s = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", ring.app.port, timeout=30)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", content, headers)
        ended, detail = refusal(connection.getresponse())
    finally:
        connection.close()
    if word not in detail:
        ended, detail = Ended.WRONG, f"{word!r} is not named: {detail}"
    return Result(began_s, time.monotonic(), ended, detail)


def _require_refused(results: list[Result], beginning: str) -> None:
    """Every one either served or refused like this, and some refused."""
    refused = [one for one in results if one.ended is not Ended.OK]
    bad = [one for one in refused if not one.detail.startswith(beginning)]
    if bad or not refused:
        raise RuntimeError(f"{len(refused)} were refused, and not with {beginning}: {bad[:3]}")


def _offers(ring: ChaosApp) -> int:
    """Offers that prefill made and that ended, in whichever way."""
    totals = ring.app.totals("prefill")
    return sum(count for name, count in totals.items() if name.startswith("owner_"))
