"""What happens to requests when replicas die or clients leave, with real processes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.load.streams import Stream
from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.vllm_server import get, metric, post
from tests.support.transfers.fault_points import FaultPoints
from transfer import faults

pytestmark = pytest.mark.timeout(600)

MODEL = "tiny"
PROMPT = "The quick brown fox jumps over the lazy dog and then it goes home to sleep. " * 2
LONG = 600
MAX_REQUESTS = 16
EVENTS = "ray_baton_router_events_total"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELD_WITHIN_S = 60.0


def wait_for(probe: Callable[[], Any], failure: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            pytest.fail(failure)
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> FaultPoints:
    return FaultPoints(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def app(
    tiny_model: Path, points: FaultPoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("failover")
    config = write_config(
        folder,
        model=str(tiny_model),
        model_id=MODEL,
        prefill={"replicas": 2},
        decode={"replicas": 2},
        router={"max_requests": MAX_REQUESTS},
    )
    env = {faults.VARIABLE: str(points.folder)}
    with BatonApp(config, folder / "up.log", env) as running:
        yield running


@pytest.fixture
def two_by_two(app: BatonApp, points: FaultPoints) -> BatonApp:
    """The application with all its replicas up and nothing left of the test before."""

    points.clear()
    whole_again(app)
    idle_within(app, 10.0)
    return app


def whole_again(app: BatonApp) -> None:
    """Waits until all replicas are up."""

    def whole() -> bool:
        status = app.status()
        return all(len(status[side]) == 2 for side in ("prefill", "decode"))

    wait_for(whole, f"not all replicas came up: {app.status()}", 200.0)


def unfinished(app: BatonApp) -> int:
    workers = [worker for side in app.status().values() for worker in side]
    return sum(w["unfinished_requests"] + w["offers"] + w["loads"] for w in workers)


def idle_within(app: BatonApp, seconds: float) -> float:
    """Waits until both engines are idle and no block is pinned; returns how long that took."""
    start = time.monotonic()
    while unfinished(app) or app.pinned_blocks():
        if time.monotonic() - start > seconds:
            pytest.fail(f"not idle after {seconds} s: {app.status()}")
        time.sleep(0.02)
    return time.monotonic() - start


def replica_pids(app: BatonApp, side: str) -> set[int]:
    return {worker["replica_pid"] for worker in app.status()[side]}


def request(number: int, **more: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a long greedy request; even ones are completions, odd ones chats."""
    text = f"{number} {PROMPT}"
    what = {"messages": [{"role": "user", "content": text}]} if number % 2 else {"prompt": text}
    body = {"model": MODEL, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, **more}
    return (CHAT if number % 2 else COMPLETIONS), {**body, **what}


def ask(app: BatonApp, path: str, body: dict[str, Any]) -> tuple[int, str | None, dict[str, Any]]:
    """Status, ``Retry-After`` and document of an answer in one piece."""
    connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        retry_after = response.getheader("Retry-After")
        return response.status, retry_after, json.loads(response.read())
    finally:
        connection.close()


def undisturbed(app: BatonApp, path: str, body: dict[str, Any]) -> tuple[str, str, Any]:
    return told(post(f"{app.url}{path}", body))


def told(answer: dict[str, Any]) -> tuple[str, str, Any]:
    """What a client reads in a whole answer."""
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
    return text, choice["finish_reason"], usage


def whole(stream: Stream) -> tuple[str, str, Any]:
    """A stream's answer, after checking that it is one unbroken answer."""
    for _ in stream:
        pass
    assert stream.errors == []
    assert stream.ended
    (reason,) = stream.finish_reasons
    (usage,) = stream.usage
    assert len({event["id"] for event in stream.events}) == 1
    assert len({event["created"] for event in stream.events}) == 1
    return stream.text, reason, {k: usage[k] for k in ("prompt_tokens", "completion_tokens")}


STREAMS: list[dict[str, Any]] = [
    {},
    {},
    {"stop": ["zzzz never", "there zzz"], "min_tokens": 500},
    {"stop": ["zzzz never", "there zzz"]},
    {"repetition_penalty": 1.2, "seed": 4},
    {"logit_bias": {"70": 3.0}, "max_tokens": 560},
]


def test_streams_survive_the_death_of_their_decode_replica(
    two_by_two: BatonApp, points: FaultPoints
) -> None:
    app = two_by_two
    asked = [request(number, **more) for number, more in enumerate(STREAMS)]
    expected = [undisturbed(app, *one) for one in asked]
    streams = [Stream(app.url, *one) for one in asked]
    with ThreadPoolExecutor(len(streams)) as pool, ExitStack() as clients:
        for stream in streams:
            clients.enter_context(stream)
        readers: list[Future[Any]] = [pool.submit(whole, stream) for stream in streams]
        wait_for(lambda: all(len(s.events) > 5 for s in streams), "the streams do not begin")
        armed = points.arm("decode.streaming")
        armed.wait(HELD_WITHIN_S)
        assert armed.pid in replica_pids(app, "decode")
        os.kill(armed.pid, signal.SIGKILL)
        answers = [reader.result(120) for reader in readers]
        armed.release()
    assert answers == expected
    idle_within(app, 5.0)


def test_requests_outlive_replicas_until_one_is_left(
    two_by_two: BatonApp, points: FaultPoints
) -> None:
    """Three of four replicas are killed one after the other, each with the request in its hands."""
    app = two_by_two
    path, body = request(40, max_tokens=40)
    expected = undisturbed(app, path, body)
    (first, second), decodes = replica_pids(app, "prefill"), replica_pids(app, "decode")

    def ask(point: str, victim: Callable[[int], int]) -> None:
        armed = points.arm(point)
        with Stream(app.url, path, body) as stream, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(whole, stream)
            armed.wait(HELD_WITHIN_S)
            os.kill(victim(armed.pid), signal.SIGKILL)
            armed.release()
            assert answer.result(60) == expected, f"after {point}"

    killed: list[int] = []

    def itself(held: int) -> int:
        killed.append(held)
        return held

    # Before its ticket: the other prefill replica computes.
    ask("prefill.computing", itself)
    assert killed[0] in (first, second)
    # After its ticket: decode cannot read, and computes itself.
    (other,) = {first, second} - {killed[0]}
    ask("router.ticket", lambda held: other)
    # No prefill replica is left, and decode dies before its first output: the other one computes.
    ask("decode.accepted", itself)
    assert killed[1] in decodes
    assert app.pinned_blocks() == 0


HELD_BY_ROUTER_OR_REPLICA = [
    "router.queued",
    "prefill.computing",
    "prefill.answering",
    "router.ticket",
    "decode.accepted",
    "router.output",
    "router.stream",
    "decode.streaming",
]
HELD_IN_TRANSFER = ["reader.connecting", "reader.reading", "reader.confirming", "reader.confirmed"]


@pytest.mark.parametrize("point", HELD_BY_ROUTER_OR_REPLICA + HELD_IN_TRANSFER)
def test_client_that_leaves_frees_everything_within_a_second(
    two_by_two: BatonApp, points: FaultPoints, point: str
) -> None:
    app = two_by_two
    path, body = request(point_number(point), max_tokens=700)
    in_mid_stream = point in ("router.stream", "decode.streaming")
    try:
        if not in_mid_stream:
            armed = points.arm(point)
        with Stream(app.url, path, body) as stream:
            if in_mid_stream:
                next(iter(stream))
                armed = points.arm(point)
            armed.wait(HELD_WITHIN_S)
        if point in HELD_IN_TRANSFER:
            # The read's own thread is held; nobody can take its memory away from under it.
            armed.release()
        idle_within(app, 1.0)
    finally:
        points.clear()
    # Nor does what was held bring anything with it.
    time.sleep(0.2)
    idle_within(app, 1.0)


def point_number(point: str) -> int:
    """Prompts differ, or decode would have their blocks in its prefix cache."""
    return 100 + (HELD_BY_ROUTER_OR_REPLICA + HELD_IN_TRANSFER).index(point)


def test_replica_whose_engine_dies_is_replaced_and_its_streams_go_on(two_by_two: BatonApp) -> None:
    app = two_by_two
    asked = [request(number) for number in range(200, 204)]
    expected = [undisturbed(app, *one) for one in asked]
    victim = app.status()["decode"][0]
    with ThreadPoolExecutor(len(asked)) as pool, ExitStack() as clients:
        streams = [clients.enter_context(Stream(app.url, *one)) for one in asked]
        readers: list[Future[Any]] = [pool.submit(whole, stream) for stream in streams]
        wait_for(lambda: all(len(s.events) > 2 for s in streams), "the streams do not begin")
        # The engine's process, not the replica's, which has to notice and say so.
        assert victim["pid"] != victim["replica_pid"]
        os.kill(victim["pid"], signal.SIGKILL)
        assert [reader.result(120) for reader in readers] == expected

    def gone() -> bool:
        return not Path(f"/proc/{victim['replica_pid']}").exists()

    wait_for(gone, "the replica stayed", 60.0)


@pytest.mark.parametrize(
    ("side", "point"), [("prefill", "prefill.computing"), ("decode", "decode.accepted")]
)
def test_a_prompt_that_kills_engines_costs_two_and_is_not_tried_again(
    two_by_two: BatonApp, points: FaultPoints, side: str, point: str
) -> None:
    app = two_by_two
    asked = [request(number, max_tokens=24) for number in range(300, 304)]
    expected = [undisturbed(app, *one) for one in asked]
    engines = {worker["replica_pid"]: worker["pid"] for worker in app.status()[side]}
    other_side = "decode" if side == "prefill" else "prefill"
    others = app.status()[other_side]
    _, killer = request(350 if side == "prefill" else 352, user="killer", max_tokens=24)
    killed, over = list[int](), threading.Event()

    def kill_whoever_has_it() -> None:
        while not over.is_set():
            armed = points.arm(point, "killer")
            while not over.is_set():
                with suppress(TimeoutError):
                    armed.wait(0.2)
                    killed.append(armed.pid)
                    # Of a replica that came in another's place, all of it.
                    os.kill(engines.get(armed.pid, armed.pid), signal.SIGKILL)
                    break
            armed.release()

    def served(number: int) -> list[Any]:
        answers = []
        while not over.is_set():
            status, _, answer = ask(app, *asked[number])
            answers.append(told(answer) if status == 200 else status)
        return answers

    with ThreadPoolExecutor(len(asked) + 1) as pool:
        killing = pool.submit(kill_whoever_has_it)
        bystanders = [pool.submit(served, number) for number in range(len(asked))]
        try:
            refused = [ask(app, COMPLETIONS, killer) for _ in range(3)]
        finally:
            over.set()
        killing.result()
        answers = [bystander.result() for bystander in bystanders]

    assert [status for status, _, _ in refused] == [500] * 3, refused
    assert sorted(killed) == sorted(engines)
    assert {worker["pid"] for worker in app.status()[other_side]} == {one["pid"] for one in others}
    for right, given in zip(expected, answers, strict=True):
        # Without prefill decode computes; without any decode engine one has to come again.
        allowed: list[Any] = [right, 503] if side == "decode" else [right]
        assert given
        assert all(answer in allowed for answer in given), given
    whole_again(app)
    assert [undisturbed(app, *one) for one in asked] == expected


def test_what_is_too_much_is_refused_before_prefill(two_by_two: BatonApp) -> None:
    app = two_by_two
    _, body = request(400, max_tokens=150)
    before = app.totals("prefill").get("owner_released", 0)

    def ask_for(number: int) -> tuple[int, str | None, dict[str, Any]]:
        return ask(app, COMPLETIONS, {**body, "prompt": f"{number} {body['prompt']}"})

    count = 3 * MAX_REQUESTS
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask_for, range(count)))
    served = [answer for status, _, answer in answers if status == 200]
    refused = [(retry, answer) for status, retry, answer in answers if status == 429]
    assert len(served) + len(refused) == count
    assert len(served) >= MAX_REQUESTS
    assert refused
    for retry_after, answer in refused:
        assert int(retry_after or 0) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
    assert all(answer["usage"]["completion_tokens"] == 150 for answer in served)
    idle_within(app, 10.0)
    assert app.totals("prefill")["owner_released"] - before == len(served)

    def counted() -> float:
        return metric(get(f"{app.url}/metrics")[1], EVENTS, event="refused")

    wait_for(lambda: counted() == len(refused), "the metric does not count them")
