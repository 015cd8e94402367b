"""The application that faults are injected into: 2 prefill, 2 decode, three etcd members, TCP."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.load.questions import Ended, Load, Question, ask
from tests.support.load.reference import reference_texts
from tests.support.network.link_relays import WorkerRelays
from tests.support.processes.app_processes import AppProcesses, Usage
from tests.support.processes.world import World
from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.etcd_cluster import EtcdCluster
from tests.support.transfers.fault_points import FaultPoints

MODEL = "tiny"
REPLICAS = 2
IN_FLIGHT = 6
MAX_REQUESTS = 24
LEASE_TTL_S = 5
READ_DEADLINE_S = 6.0
TICKET_TTL_S = 15.0
SETTLE_S = 20.0
DRAIN_TIMEOUT_S = 20.0

_MAX_MODEL_LEN = 1024
_MAX_TOKENS = 48
_LENGTHS = (1, 30, 33, 64, 97, 130, 200, 270, 350, 420, 500, 580, 640, 700, 800, 900)
_REPLACED_S = 150.0


@dataclass
class ChaosApp:
    """What a fault can lay its hands on.

    Attributes:
        questions: with the answers of a single engine, and the usage of undisturbed answers.
        before: what processes held when everything had been used once.
    """

    app: BatonApp
    etcd: EtcdCluster
    relays: WorkerRelays
    world: World
    points: FaultPoints
    processes: AppProcesses
    questions: list[Question]
    before: dict[str, Usage]

    def load(self, in_flight: int = IN_FLIGHT) -> Load:
        """Clients that are not started yet."""
        return Load(self.app.url, MODEL, self.questions, in_flight)

    def workers(self, side: str) -> list[dict[str, Any]]:
        """Status of the workers of a side that answer; none while the application cannot say."""
        try:
            return self.app.status()[side]
        except (OSError, RuntimeError):
            return []

    def pid_of(self, engine_id: str) -> int:
        """The engine process of a worker.

        Raises:
            LookupError: it does not answer.
        """
        for side in ("prefill", "decode"):
            for worker in self.workers(side):
                if worker["engine_id"] == engine_id:
                    return int(worker["pid"])
        raise LookupError(f"no worker {engine_id}")

    def wait_complete(self, timeout_s: float = _REPLACED_S) -> float:
        """Until every replica of both sides serves; the seconds it took.

        Raises:
            TimeoutError: says who is there.
        """
        began = time.monotonic()
        while not all(self._complete(side) for side in ("prefill", "decode")):
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"not all replicas are there: {self.app.status()}")
            time.sleep(0.5)
        return time.monotonic() - began

    def leaks(self) -> list[str]:
        """What is still held when nothing is asked any more, after a moment to let go of it."""
        deadline = time.monotonic() + SETTLE_S
        while (found := self._held()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def busy(self) -> list[str]:
        """Requests that run and blocks that are pinned or being read, in words."""
        found = []
        for side in ("prefill", "decode"):
            for worker in self.workers(side):
                found += [
                    f"{side} {worker['engine_id']}: {worker[what]} {what}"
                    for what in ("pinned_blocks", "offers", "loads", "unfinished_requests")
                    if worker[what]
                ]
        return found

    def _complete(self, side: str) -> bool:
        workers = self.workers(side)
        replicas = self.processes.replicas(side.capitalize())
        return len(workers) == REPLICAS == len(replicas) and all(
            worker["healthy"] for worker in workers
        )

    def _held(self) -> list[str]:
        found = [*self.busy(), *self.processes.orphans()]
        for role, now in self.processes.usage().items():
            if role in self.before:
                found += [f"{role}: {what}" for what in now.above(self.before[role])]
        return found


@contextmanager
def chaos_app(
    model: Path,
    folder: Path,
    transfer: Mapping[str, Any] | None = None,
    max_requests: int = MAX_REQUESTS,
) -> Iterator[ChaosApp]:
    """Start it, ask every question once, and end it.

    Args:
        transfer: more settings of its transfers.
        max_requests: that it lets in at once.
    """
    prompts = [random.Random(length).choices(range(3, 200), k=length) for length in _LENGTHS]
    points = FaultPoints(folder / "faults")
    world = World(folder / "world")
    with ExitStack() as stack:
        etcd = stack.enter_context(EtcdCluster())
        config = write_config(
            folder,
            model=str(model),
            model_id=MODEL,
            # Without prefix caches every request is a hand-off, however often it is asked.
            engine={"max_model_len": _MAX_MODEL_LEN, "enable_prefix_caching": False},
            prefill={"replicas": REPLICAS, "drain_timeout_s": DRAIN_TIMEOUT_S},
            decode={"replicas": REPLICAS, "drain_timeout_s": DRAIN_TIMEOUT_S},
            router={"max_requests": max_requests},
            transfer={
                "transports": ["tcp"],
                "digests": True,
                "read_deadline_s": READ_DEADLINE_S,
                "ticket_ttl_s": TICKET_TTL_S,
                **(transfer or {}),
            },
            discovery={
                "kind": "etcd",
                "endpoints": etcd.endpoints,
                "cluster": "chaos",
                "lease_ttl_s": LEASE_TTL_S,
            },
        )
        texts = reference_texts(
            str(model),
            prompts,
            max_tokens=_MAX_TOKENS,
            max_model_len=_MAX_MODEL_LEN,
            folder=folder,
        )
        relays = stack.enter_context(WorkerRelays(world, etcd.endpoints, "chaos"))
        environment = {
            **world.environment,
            "BATON_FAULTS": str(points.folder),
            # Ray makes its workers nice: anything else on the machine stops them for seconds.
            "RAY_worker_niceness": "0",
            # By default oneDNN keeps kernels for 1024 shapes, and so an engine on CPU grows by
            # 290 MB while it meets new lengths of prompts: other growth would not be seen.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
            # Else glibc raises it when such a kernel is freed, and gaps between them stay.
            "MALLOC_MMAP_THRESHOLD_": "262144",
        }
        app = stack.enter_context(BatonApp(config, folder / "up.log", environment))
        questions = [
            Question(tuple(prompt), _MAX_TOKENS, text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        processes = AppProcesses(app.process.pid)
        running = ChaosApp(app, etcd, relays, world, points, processes, questions, {})
        running.wait_complete()
        running.questions = [_with_usage(running, question) for question in questions]
        _use_everything(running)
        running.before = processes.usage()
        yield running
        points.clear()


def _with_usage(running: ChaosApp, question: Question) -> Question:
    """The question, asked undisturbed."""
    host = running.app.url.removeprefix("http://")
    ended, detail = ask(host, MODEL, question, streamed=False)
    if ended is not Ended.OK:
        raise RuntimeError(f"an undisturbed request of {len(question.prompt)} tokens: {detail}")
    return replace(question, usage=tuple(json.loads(detail).items()))


def _use_everything(running: ChaosApp) -> None:
    """Ask until every decode worker has read from every prefill worker."""
    load = running.load()
    load.start()
    deadline = time.monotonic() + 60
    while not all(
        len(worker["reads_by_owner"]) >= REPLICAS for worker in running.workers("decode")
    ):
        if time.monotonic() > deadline:
            raise TimeoutError("not every pair hands over")
        time.sleep(0.2)
    undisturbed = load.stop()
    wrong = [result for result in undisturbed if result.ended is not Ended.OK]
    if wrong or not running.relays.passed_bytes:
        raise RuntimeError(f"undisturbed requests failed, or not through relays: {wrong[:3]}")


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone already is all right."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def stop(pid: int) -> None:
    """SIGSTOP."""
    os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    """SIGCONT; a process that was killed meanwhile is all right."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return
