"""Threads that serve one connection after the other."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from queue import SimpleQueue
from typing import cast

import pytest

from tests.support.processes.waiting import wait_until
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.threads import ServingThreads

FOR_GOOD_S = 600.0


@dataclass(frozen=True)
class _Stream:
    peer: str


def stream(number: int) -> TcpStream:
    """Nothing but its name is looked at."""
    return cast(TcpStream, _Stream(f"peer-{number}"))


class Served:
    """What was served, each until it is let go."""

    def __init__(self, linger_s: float = FOR_GOOD_S, most_idle: int = 32) -> None:
        self.ended: SimpleQueue[int] = SimpleQueue()
        self.threads: dict[TcpStream, threading.Thread] = {}
        self.pool = ServingThreads("test-serve", self._serve, linger_s, most_idle)

    def _serve(self, stream: TcpStream) -> None:
        thread = threading.current_thread()
        assert thread.name == f"test-serve-{stream.peer}"
        self.threads[stream] = thread
        self.ended.get()

    def let_go(self, count: int = 1) -> None:
        for _ in range(count):
            self.ended.put(0)

    def begin(self, *numbers: int) -> None:
        for number in numbers:
            self.pool.serve(stream(number))
        assert wait_until(lambda: all(stream(number) in self.threads for number in numbers))

    def shows(self, threads: int, idle: int) -> bool:
        wanted = f"<ServingThreads test-serve {threads}, {idle} of them idle>"
        return wait_until(lambda: repr(self.pool) == wanted)

    def close(self) -> None:
        self.pool.close()
        self.pool.join()
        assert self.shows(0, 0)


def test_a_thread_serves_the_next_stream_when_its_own_has_ended() -> None:
    served = Served()
    served.begin(1)
    served.let_go()
    assert served.shows(1, 1)
    assert served.threads[stream(1)].name == "baton-idle"
    served.begin(2)
    assert served.shows(1, 0)
    assert served.threads[stream(1)] == served.threads[stream(2)]
    served.let_go()
    served.close()


def test_streams_do_not_wait_for_each_other() -> None:
    served = Served()
    served.begin(1, 2, 3)
    assert len(set(served.threads.values())) == 3
    served.let_go(2)
    assert served.shows(3, 2)
    served.begin(4, 5, 6)
    assert served.shows(4, 0)
    served.let_go(4)
    served.close()


def test_few_threads_wait() -> None:
    served = Served(most_idle=1)
    served.begin(1, 2, 3)
    served.let_go(3)
    assert served.shows(1, 1)
    served.close()


def test_threads_do_not_wait_for_ever() -> None:
    served = Served(linger_s=0.01)
    served.begin(1, 2)
    served.let_go(2)
    assert served.shows(0, 0)
    served.begin(3)
    served.let_go()
    served.close()


def test_a_stream_that_comes_when_a_thread_gives_up_waiting_is_served() -> None:
    served = Served(linger_s=1e-6)
    for number in range(500):
        served.let_go()
        served.begin(number)
    served.close()


def test_without_a_thread_to_spare_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    served = Served()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError, match="can't start"):
            served.pool.serve(stream(1))
    assert served.shows(0, 0)
    served.begin(2)
    served.let_go()
    assert served.shows(1, 1)
    assert stream(1) not in served.threads
    served.close()


def test_closing_waits_for_those_that_serve() -> None:
    served = Served()
    served.begin(1, 2)
    served.let_go()
    assert served.shows(2, 1)
    served.pool.close()
    assert served.shows(1, 0)
    served.let_go()
    served.close()
