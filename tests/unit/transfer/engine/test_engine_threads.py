"""The engine's timer, workers, budget and handle, without any I/O."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.processes.waiting import wait_until
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.reading import workers as workers_module
from transfer.engine.reading.budget import ByteBudget
from transfer.engine.reading.workers import Workers
from transfer.engine.timer import DeadlineTimer
from transfer.errors import PeerUnreachable, Phase, TransferCancelled, TransferError
from transfer.transports.interrupt import Interrupt
from transfer.types import PeerId


def test_timer_calls_in_order_of_time_and_not_what_was_cancelled() -> None:
    timer, called = DeadlineTimer("timer"), []
    timer.start()
    now = time.monotonic()
    timer.schedule(now + 0.06, lambda: called.append("late"))
    cancelled = [timer.schedule(now + 0.03, lambda: called.append("never")) for _ in range(200)]
    timer.schedule(now + 0.02, lambda: called.append("early"))
    for entry in cancelled * 2:
        timer.cancel(entry)
    assert wait_until(lambda: len(called) == 2)
    timer.schedule(now + 60, lambda: called.append("after closing"))
    timer.close()
    timer.close()
    assert called == ["early", "late"]


def test_workers_are_no_more_than_the_limit() -> None:
    workers, gate = Workers("work", 3), threading.Event()
    running: list[int] = []

    def task() -> None:
        running.append(1)
        gate.wait(5)

    for _ in range(10):
        assert workers.submit(task)
    assert wait_until(lambda: len(running) == 3)
    time.sleep(0.02)
    assert len(running) == 3
    assert not workers.quiet
    gate.set()
    workers.shut()
    assert not workers.submit(task)
    workers.join()
    assert len(running) == 10
    assert not workers.alive


def test_idle_workers_end_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_LINGER_S", 0.02)
    workers, done = Workers("work", 2), []
    for number in range(2):
        workers.submit(lambda number=number: done.append(number))  # type: ignore[misc]
        assert wait_until(lambda: not workers.alive)
        assert workers.quiet
    assert done == [0, 1]
    workers.shut()
    workers.join()


def test_budget_is_first_come_first_served() -> None:
    budget, got = ByteBudget(100), []
    release = threading.Event()

    def take(amount: int) -> None:
        with budget.taken(amount, Interrupt()):
            got.append(amount)
            release.wait(5)

    threads = []
    for amount in (60, 200, 30):
        thread = threading.Thread(target=take, args=(amount,))
        thread.start()
        threads.append(thread)
        time.sleep(0.02)
    assert got == [60]  # 200 waits for all, and 30 behind it
    release.set()
    for thread in threads:
        thread.join()
    assert got == [60, 200, 30]


def test_budget_says_so_before_it_lets_wait() -> None:
    budget, said = ByteBudget(100), threading.Event()

    def take() -> None:
        with budget.taken(100, Interrupt(), said.set):
            pass

    take()
    assert not said.is_set()
    with budget.taken(1, Interrupt()):
        thread = threading.Thread(target=take)
        thread.start()
        assert said.wait(5)
    thread.join(5)
    assert not thread.is_alive()


def test_budget_lets_go_of_who_is_interrupted() -> None:
    budget, interrupt = ByteBudget(100), Interrupt()
    errors: list[TransferError] = []

    def take() -> None:
        try:
            with budget.taken(100, interrupt):
                pass
        except TransferError as error:
            errors.append(error)

    with budget.taken(1, Interrupt()):
        thread = threading.Thread(target=take)
        thread.start()
        time.sleep(0.02)
        interrupt.set(gone())
        thread.join(5)
    assert [type(error) for error in errors] == [PeerUnreachable]
    with budget.taken(100, Interrupt()):
        pass


def gone() -> PeerUnreachable:
    return PeerUnreachable("gone", phase=Phase.READ)


def handle_in(*states: TransferState) -> TransferHandle:
    handle = TransferHandle(PeerId("p", 0), "h", 10.0)
    for state in states:
        handle.advance(state)
    return handle


@pytest.mark.parametrize(
    "states",
    [
        [],
        [TransferState.CONNECTING],
        [TransferState.CONNECTING, TransferState.READING, TransferState.CONFIRMING],
    ],
)
def test_a_handle_whose_memory_nobody_writes_to_is_cancelled_at_once(
    states: list[TransferState],
) -> None:
    handle = handle_in(*states)
    handle.cancel()
    assert handle.state is TransferState.CANCELLED
    with pytest.raises(TransferCancelled):
        handle.advance(TransferState.READING)
    handle.finish(None)
    assert handle.state is TransferState.CANCELLED
    assert isinstance(handle.error, TransferCancelled)


def test_a_handle_that_reads_is_cancelled_when_its_thread_is_done() -> None:
    handle = handle_in(TransferState.CONNECTING, TransferState.READING)
    stopped: list[str] = []
    with handle.interrupt.watched_by(lambda: stopped.append("streams")):
        handle.cancel()
    assert not handle.wait(0)
    assert stopped == ["streams"]
    finals: list[TransferHandle] = []
    handle.when_final(finals.append)
    handle.finish(gone())
    handle.when_final(finals.append)
    assert (handle.state, finals) == (TransferState.CANCELLED, [handle, handle])


def test_the_first_error_wins() -> None:
    handle = handle_in(TransferState.CONNECTING, TransferState.READING)
    handle.stop(gone())
    handle.cancel()
    handle.finish(None)
    assert handle.state is TransferState.FAILED
    assert isinstance(handle.error, PeerUnreachable)


def test_timings_add_up() -> None:
    handle = handle_in(TransferState.CONNECTING)
    assert handle.timings.read_s == 0
    for state in (TransferState.READING, TransferState.CONNECTING) * 2:
        time.sleep(0.01)
        handle.advance(state)
    assert handle.timings.total_s >= 0.04
    handle.finish(None)
    timings = handle.timings
    assert timings.read_s >= 0.02
    assert timings.total_s >= timings.read_s + 0.02
    assert handle.timings == timings


def no_more_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_task_is_not_kept_that_no_thread_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, done = Workers("work", 2), []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more_threads)
        with pytest.raises(RuntimeError, match="new thread"):
            workers.submit(lambda: done.append("lost"))
    assert workers.quiet
    assert not workers.alive
    assert workers.submit(lambda: done.append("later"))
    workers.shut()
    workers.join()
    assert done == ["later"]


def test_tasks_wait_for_the_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, gate, done = Workers("work", 2), threading.Event(), []
    workers.submit(lambda: done.append(gate.wait(5)))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more_threads)
        assert workers.submit(lambda: done.append(True))
    gate.set()
    workers.shut()
    workers.join()
    assert done == [True, True]
