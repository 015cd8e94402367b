"""Clients that leave, that do not read, and whose streams nobody else can go on with."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from tests.support.chaos.app import MODEL, ChaosApp, kill
from tests.support.chaos.fault import Began, Inject
from tests.support.load.questions import Ended, Result
from tests.support.load.streams import Stream
from tests.support.servers.vllm_server import post

_FREED_WITHIN_S = 1.0

_COMPLETIONS = "/v1/completions"
_BROKEN_STREAMS = 6
_UNREAD_STREAMS = 12
_RECEIVE_BYTES = 4096
_MADE_WITHIN_S = 60.0


def client_leaves(point: str) -> Inject:
    """A client goes away while its request is held at ``point``; everything is free at once.

    It is the only client then: others would hide what it leaves behind.
    """

    def inject(ring: ChaosApp, began: Began) -> None:
        armed = ring.points.arm(point)
        connection = _ask_and_leave_open(ring)
        armed.wait()
        began()
        connection.close()
        time.sleep(0.3)
        armed.release()
        until_free(ring, began, _FREED_WITHIN_S)

    return inject


def client_leaves_while_decoding(ring: ChaosApp, began: Began) -> None:
    """A client goes away after the first tokens."""
    connection = _ask_and_leave_open(ring)
    response = connection.getresponse()
    response.readline()
    began()
    connection.close()
    response.close()
    until_free(ring, began, _FREED_WITHIN_S)


def _ask_and_leave_open(ring: ChaosApp) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", ring.app.port, timeout=30)
    body = {
        "model": MODEL,
        "prompt": list(ring.questions[-1].prompt),
        "max_tokens": 100,
        "min_tokens": 100,
        "stream": True,
    }
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    return connection


def until_free(ring: ChaosApp, began: Began, within_s: float) -> None:
    """Until no engine has a request and no block is pinned, and that stays so.

    Raises:
        TimeoutError: says what is held.
        RuntimeError: something began again.
    """
    deadline = time.monotonic() + within_s
    while held := ring.busy():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not free within {within_s} s: {held}")
        time.sleep(0.05)
    began.over()
    # A request that nobody cancelled would begin only now to be busy.
    time.sleep(0.5)
    if held := ring.busy():
        raise RuntimeError(f"busy again: {held}")


# ---- streams ----------------------------------------------------------------------------------


def break_streams(ring: ChaosApp, began: Began) -> None:
    """SIGKILL a decode engine under streams with log-probabilities: nobody can go on with them."""
    body = _own_request(ring, logprobs=1, max_tokens=400)
    expected = _text(post(f"{ring.app.url}{_COMPLETIONS}", body))
    streams = [Stream(ring.app.url, _COMPLETIONS, body) for _ in range(_BROKEN_STREAMS)]
    with ThreadPoolExecutor(len(streams)) as pool, ExitStack() as clients:
        for stream in streams:
            clients.enter_context(stream)
        readers = [pool.submit(_read, stream, expected) for stream in streams]
        while not all(len(stream.events) > 2 for stream in streams):
            time.sleep(0.02)
        busiest = max(ring.workers("decode"), key=lambda worker: worker["unfinished_requests"])
        began()
        kill(int(busiest["pid"]))
        began.own = [reader.result() for reader in readers]
    endings = {one.ended for one in began.own}
    if Ended.REFUSED not in endings:
        raise LookupError("the engine that was killed had none of the streams")
    if not endings <= {Ended.OK, Ended.REFUSED}:
        raise RuntimeError(f"not an answer, not an error: {began.own}")


def clients_do_not_read(ring: ChaosApp, began: Began) -> None:
    """Long streams of which nothing is read before they are made: replicas do not wait for it."""
    body = _own_request(ring, logprobs=20, max_tokens=800, ignore_eos=True)
    expected = _text(post(f"{ring.app.url}{_COMPLETIONS}", body))
    streams = [
        Stream(ring.app.url, _COMPLETIONS, body, receive_bytes=_RECEIVE_BYTES)
        for _ in range(_UNREAD_STREAMS)
    ]
    with ExitStack() as clients:
        began()
        for stream in streams:
            clients.enter_context(stream)
        while not ring.busy():
            time.sleep(0.02)
        until_free(ring, began, _MADE_WITHIN_S)
        began.own = [_read(stream, expected) for stream in streams]


def _own_request(ring: ChaosApp, **more: Any) -> dict[str, Any]:
    prompt = list(ring.questions[6].prompt)
    return {"model": MODEL, "prompt": prompt, "temperature": 0, **more}


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def _read(stream: Stream, expected: str) -> Result:
    """Reads a stream to its end and judges it."""
    began_s = time.monotonic()
    for _ in stream:
        pass
    if stream.errors:
        ended, detail = Ended.REFUSED, f"in the stream: {stream.errors[0]['message']}"
    elif stream.ended and stream.text == expected:
        ended, detail = Ended.OK, ""
    elif stream.ended:
        ended, detail = Ended.WRONG, f"{stream.text!r} instead of {expected!r}"
    else:
        ended, detail = Ended.BROKEN, f"no [DONE] after {len(stream.events)} events"
    return Result(began_s, time.monotonic(), ended, detail)
