"""What happens to requests when replicas die or clients leave, with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.baton_app import BatonApp, write_config
from tests.support.streams import Stream
from tests.support.vllm_server import post
from transfer import faults

pytestmark = pytest.mark.timeout(600)

MODEL = "tiny"
PROMPT = "The quick brown fox jumps over the lazy dog and then it goes home to sleep. " * 3
LONG = 300
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Holds:
    """Arms fault points of the application's processes; see :mod:`transfer.faults`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, point: str) -> None:
        (self.folder / point).touch()

    def pid(self, point: str) -> int:
        """Waits until a process is held at the point."""
        return int(wait_for(lambda: self._held(point), f"nobody reached {point}"))

    def let_go(self, point: str) -> None:
        """Disarms the point and frees who is held there."""
        for file in (self.folder / point, *self.folder.glob(f"{point}@*")):
            file.unlink(missing_ok=True)

    def _held(self, point: str) -> int:
        return next((int(f.name.split("@")[1]) for f in self.folder.glob(f"{point}@*")), 0)


def wait_for(probe: Callable[[], Any], failure: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            pytest.fail(failure)
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def holds(tmp_path_factory: pytest.TempPathFactory) -> Holds:
    return Holds(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def app(
    tiny_model: Path, holds: Holds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatonApp]:
    folder = tmp_path_factory.mktemp("failover")
    config = write_config(
        folder,
        model=str(tiny_model),
        model_id=MODEL,
        prefill={"replicas": 2},
        decode={"replicas": 2},
        router={"max_body_bytes": 1 << 20},
    )
    env = {faults.VARIABLE: str(holds.folder)}
    with BatonApp(config, folder / "up.log", env) as running:
        yield running


@pytest.fixture
def two_by_two(app: BatonApp) -> BatonApp:
    """The application with all its replicas up and nothing left of the test before."""

    def whole() -> bool:
        status = app.status()
        return all(len(status[side]) == 2 for side in ("prefill", "decode"))

    wait_for(whole, f"not all replicas came up: {app.status()}", 120.0)
    idle_within(app, 10.0)
    return app


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


def undisturbed(app: BatonApp, path: str, body: dict[str, Any]) -> tuple[str, str, Any]:
    answer = post(f"{app.url}{path}", body)
    (choice,) = answer["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
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
    {"stop": ["zzzz never", "there zzz"], "min_tokens": 250},
    {"stop": ["zzzz never", "there zzz"]},
    {"repetition_penalty": 1.2, "seed": 4},
    {"logit_bias": {"70": 3.0}, "max_tokens": 280},
]


def test_streams_survive_the_death_of_their_decode_replica(
    two_by_two: BatonApp, holds: Holds
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
        holds.arm("decode.streaming")
        victim = holds.pid("decode.streaming")
        assert victim in replica_pids(app, "decode")
        os.kill(victim, signal.SIGKILL)
        answers = [reader.result(120) for reader in readers]
        holds.let_go("decode.streaming")
    assert answers == expected
    idle_within(app, 5.0)
