"""An owner in another process, which is killed, stopped and started anew under its readers."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest

from tests.support.network.stalling_proxy import StallingProxy
from tests.support.processes.waiting import SLOWNESS, wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import Buffer, Directory, fails, make_engine, succeeds
from tests.support.transfers.owner_process import OwnerReport, owner_process
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferHandle, TransferState
from transfer.errors import DeadlineExceeded, HandoffRefused, PeerUnreachable
from transfer.spans import block_spans
from transfer.types import ReadPlan

NUM_BLOCKS = 256
BLOCK_BYTES = 65_536
STALL_AT_BYTES = 3 << 20
BOUND_S = 2.0 * SLOWNESS


class Reader:
    """The reading side, in this process, and how to start owners that it can read from."""

    def __init__(self, case: TransferCase) -> None:
        self.case = case
        self.directory = Directory()
        self.local = Buffer(NUM_BLOCKS, BLOCK_BYTES, fill=0)
        self.engine: TransferEngine = make_engine(
            self.directory, "reader", settings=case.settings(slice_bytes=256 << 10)
        )
        self.engine.register(self.local.address, self.local.bytes.nbytes)

    def read(self, report: OwnerReport, number: int, deadline_s: float = 20) -> TransferHandle:
        blocks = np.arange(NUM_BLOCKS)
        remote = block_spans(report.base, report.block_bytes, report.block_bytes, blocks)
        plan = ReadPlan(self.local.spans(blocks), remote)
        return self.engine.submit_read(
            report.record.peer, report.credentials(number), lambda _: plan, deadline_s
        )

    def owner(
        self, incarnation: str
    ) -> AbstractContextManager[tuple[subprocess.Popen[str], OwnerReport]]:
        return owner_process(incarnation, NUM_BLOCKS, BLOCK_BYTES, settings=self.case.forced)

    @contextmanager
    def stalled(self, report: OwnerReport) -> Iterator[StallingProxy]:
        """Reads from the owner stop after 3 MiB until it resumes."""
        with self.case.stalled(report.address, STALL_AT_BYTES) as stall:
            self.reach_over(stall, report)
            yield stall

    def reach_over(self, stall: StallingProxy, report: OwnerReport) -> None:
        """From now on the owner is known, and reached over ``stall``."""
        self.directory.publish(report.record)
        self.directory.move(report.record.peer, stall.address)

    def has_it_all(self) -> bool:
        """The owner fills its buffer from the same seed."""
        return bool(np.array_equal(self.local.bytes, Buffer(NUM_BLOCKS, BLOCK_BYTES).bytes))


@pytest.fixture
def reader(case: TransferCase) -> Iterator[Reader]:
    made = Reader(case)
    with made.engine:
        yield made


def half_way(handle: TransferHandle) -> None:
    """Called for reads that are stalled: it stays there."""
    assert wait_until(lambda: handle.bytes_moved > 1 << 20)
    assert handle.state is TransferState.READING


def test_bytes_cross_processes(reader: Reader) -> None:
    with reader.owner("one") as (_, report):
        reader.directory.publish(report.record)
        succeeds(reader.read(report, 0))
        assert reader.has_it_all()


def test_an_owner_that_is_killed_half_way(reader: Reader) -> None:
    with (
        reader.owner("one") as (process, report),
        reader.stalled(report) as stall,
    ):
        handle = reader.read(report, 0)
        half_way(handle)
        process.kill()
        process.wait()
        begun = time.monotonic()
        stall.resume()
        fails(handle, PeerUnreachable)
        assert time.monotonic() - begun < BOUND_S


@pytest.mark.parametrize("phase", list(TransferState)[1:4])
def test_an_owner_that_is_killed_in_any_phase(
    reader: Reader, phase: TransferState, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TransferHandle.advance
    with reader.owner("one") as (process, report):
        reader.directory.publish(report.record)
        succeeds(reader.read(report, 0))

        def kill_first(handle: TransferHandle, state: TransferState) -> None:
            if state is phase:
                process.kill()
                process.wait()
            advance(handle, state)

        monkeypatch.setattr(TransferHandle, "advance", kill_first)
        fails(reader.read(report, 1), PeerUnreachable)
    monkeypatch.setattr(TransferHandle, "advance", advance)
    with reader.owner("two") as (_, report_anew):
        reader.directory.publish(report_anew.record)
        reader.local.bytes.fill(0)
        succeeds(reader.read(report_anew, 1))
        assert reader.has_it_all()


@pytest.mark.parametrize("step", ["handshake", "way for the bytes"])
def test_an_owner_that_is_killed_while_it_is_first_connected(
    reader: Reader, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has got a request and its answer never comes: with TLS, that to the ClientHello."""
    with (
        reader.owner("one") as (process, report),
        StallingProxy(report.address, 1 << 40) as stall,
    ):
        reader.reach_over(stall, report)
        if step == "handshake":
            stall.stall()
        else:
            target, method = reader.case.way_for_bytes
            make_way = getattr(target, method)

            def unanswered(*arguments: object) -> object:
                stall.stall()
                return make_way(*arguments)

            monkeypatch.setattr(target, method, unanswered)
        handle = reader.read(report, 0)
        assert wait_until(lambda: stall.holds_back)
        assert handle.state is TransferState.CONNECTING
        process.kill()
        process.wait()
        begun = time.monotonic()
        stall.cut()
        fails(handle, PeerUnreachable)
        assert time.monotonic() - begun < BOUND_S
    monkeypatch.undo()
    with reader.owner("two") as (_, report_anew):
        reader.directory.publish(report_anew.record)
        succeeds(reader.read(report_anew, 0))
        assert reader.has_it_all()


def test_an_owner_that_is_stopped_half_way(reader: Reader) -> None:
    with (
        reader.owner("one") as (process, report),
        reader.stalled(report) as stall,
    ):
        handle = reader.read(report, 0, deadline_s=1.0 * SLOWNESS)
        half_way(handle)
        process.send_signal(signal.SIGSTOP)
        stall.resume()
        begun = time.monotonic()
        fails(handle, DeadlineExceeded)
        assert time.monotonic() - begun < BOUND_S
        process.send_signal(signal.SIGCONT)
        # Over shm the bytes were there and the release was sent: the owner takes it in now.
        succeeds(reader.read(report, 1 if reader.case.one_sided else 0))
        assert reader.has_it_all()


def test_an_owner_that_is_stopped_before_it_is_asked(reader: Reader) -> None:
    with reader.owner("one") as (process, report):
        reader.directory.publish(report.record)
        process.send_signal(signal.SIGSTOP)
        fails(reader.read(report, 0, deadline_s=0.5), DeadlineExceeded)
        process.send_signal(signal.SIGCONT)
        succeeds(reader.read(report, 0))
        process.send_signal(signal.SIGSTOP)
        fails(reader.read(report, 1, deadline_s=0.5), DeadlineExceeded)
        cancelled = reader.read(report, 2)
        time.sleep(0.05)
        cancelled.cancel()
        assert cancelled.wait(0.5)
        process.send_signal(signal.SIGCONT)
        succeeds(reader.read(report, 2))


def test_an_owner_that_is_killed_and_starts_anew(reader: Reader) -> None:
    with reader.owner("one") as (process, report):
        reader.directory.publish(report.record)
        succeeds(reader.read(report, 0))
        process.kill()
    fails(reader.read(report, 1), PeerUnreachable)
    with reader.owner("two") as (_, report_anew):
        reader.directory.publish(report_anew.record)
        fails(reader.read(report, 1), HandoffRefused, "two")
        reader.local.bytes.fill(0)
        succeeds(reader.read(report_anew, 1))
        assert reader.has_it_all()


def test_idle_engines_use_no_processor(reader: Reader) -> None:
    with reader.owner("one") as (process, report):
        reader.directory.publish(report.record)
        succeeds(reader.read(report, 0))
        time.sleep(0.1)
        ticks, own_s = _ticks(process.pid), time.process_time()
        time.sleep(1.0)
        assert _ticks(process.pid) - ticks <= 1
        assert time.process_time() - own_s < 0.02


def _ticks(pid: int) -> int:
    """Processor time of a process, in hundredths of a second."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
