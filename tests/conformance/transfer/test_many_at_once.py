"""Many reads, many readers, many threads that do what they should not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes.waiting import wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Buffer,
    Pair,
    engine_pair,
    live_offers,
    succeeds,
    take_ended,
)
from tests.support.transfers.fault_points import FaultPoints
from transfer import faults
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.handoff import HandoffState
from transfer.errors import TransferCancelled, TransferError
from transfer.types import ReadPlan

HAMMERING_S = 0.6
PATIENCE_S = 15.0
"""How long to go on hammering until every outcome has been seen."""


def test_many_reads_at_once(case: TransferCase) -> None:
    tuning = case.settings(max_reads_per_peer=3, max_inflight_bytes=100_000)
    with engine_pair(256, settings=tuning) as pair:
        handles = [
            pair.read(
                pair.offer(),
                ReadPlan(pair.local.spans([block]), pair.remote.spans([block])),
            )
            for block in range(256)
        ]
        for handle in handles:
            succeeds(handle)
        assert pair.local_is_remote()
        missing = {handle.handoff_id for handle in handles}

        def all_ended() -> bool:
            missing.difference_update(one.handoff_id for one in pair.owner.take_ended())
            return not missing

        # The owner's side of a read may still be on its way back from sending.
        assert wait_until(all_ended)


def test_a_read_that_gets_stuck_holds_up_no_other(
    case: TransferCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not until ``max_reads_per_peer`` are stuck."""
    monkeypatch.setattr(faults, "_folder", tmp_path)
    with engine_pair(64, settings=case.settings(max_reads_per_peer=2)) as pair:
        point = FaultPoints(tmp_path).arm("reader.reading")
        stuck = pair.read(pair.offer())
        point.wait()
        other = Buffer(64, fill=0)
        pair.reader.register(other.address, other.bytes.nbytes)
        for _ in range(3):
            other.bytes.fill(0)
            plan = ReadPlan(other.spans(range(64)), pair.remote.spans(range(64)))
            succeeds(pair.read(pair.offer(), plan))
            assert np.array_equal(other.bytes, pair.remote.bytes)
        assert stuck.state is TransferState.READING
        point.release()
        succeeds(stuck)
        assert pair.local_is_remote()


def test_many_readers_of_one_owner(pair: Pair) -> None:
    proof = pair.offer(readers=4)
    buffers = [Buffer(64, fill=0) for _ in range(4)]
    engines = [pair.engine(f"reader-{number}") for number in range(4)]
    for number, (engine, buffer) in enumerate(zip(engines, buffers, strict=True)):
        assert pair.owner.take_ended() == []
        engine.register(buffer.address, buffer.bytes.nbytes)
        with engine:
            own = pair.with_reader(engine, buffer)
            succeeds(own.read(replace(proof, reader=str(number))))
        assert np.array_equal(buffer.bytes, pair.remote.bytes)
    assert [one.state for one in take_ended(pair.owner)] == [HandoffState.RELEASED]


def test_many_readers_at_once(pair: Pair) -> None:
    proof = pair.offer(readers=6)
    buffers = [Buffer(64, fill=0) for _ in range(6)]
    with contextlib.ExitStack() as running:
        handles = []
        for number, buffer in enumerate(buffers):
            engine = running.enter_context(pair.engine(f"reader-{number}"))
            engine.register(buffer.address, buffer.bytes.nbytes)
            own = pair.with_reader(engine, buffer)
            handles.append(own.read(replace(proof, reader=str(number))))
        for handle in handles:
            succeeds(handle)
    for buffer in buffers:
        assert np.array_equal(buffer.bytes, pair.remote.bytes)
    (ended,) = take_ended(pair.owner)
    assert ended.state is HandoffState.RELEASED


def test_threads_that_do_whatever_they_like(case: TransferCase) -> None:
    """Every read ends, those that are done have the owner's bytes, and nothing else is raised."""
    tuning = case.settings(max_reads_per_peer=3, max_inflight_bytes=200_000)
    with engine_pair(64, 4096, settings=tuning) as pair:
        handles: list[tuple[TransferHandle, int]] = []
        errors: list[BaseException] = []
        calm, stop = threading.Event(), threading.Event()

        def submit(block: int) -> TransferHandle:
            spans = [block]
            plan = ReadPlan(pair.local.spans(spans), pair.remote.spans(spans))
            handle = pair.read(pair.offer(), plan)
            handles.append((handle, block))
            return handle

        def read_and_wait(block: int) -> None:
            submit(block).wait(5)

        def read_and_cancel(block: int) -> None:
            handle = submit(block)
            time.sleep(0.0005)
            handle.cancel()
            handle.wait(5)

        def abort_what_is_read(block: int) -> None:
            for live in [] if calm.is_set() else live_offers(pair.owner)[::7]:
                pair.owner.abort(live.offer.handoff_id, "hammered")
            time.sleep(0.001)

        def register_and_forget(block: int) -> None:
            with pair.reader.register(pair.local.address + block * 4096, 4096):
                time.sleep(0.0005)

        def cut(block: int) -> None:
            record = pair.directory.lookup(pair.owner_id)
            assert record is not None
            if not calm.is_set():
                pair.directory.withdraw(pair.owner_id)
                pair.directory.publish(record)
            time.sleep(0.05)

        def hammer(act: Callable[[int], None], block: int) -> None:
            try:
                while not stop.is_set():
                    act(block)
            except BaseException as error:
                errors.append(error)
                raise

        acts = [
            read_and_wait,
            read_and_wait,
            read_and_cancel,
            read_and_cancel,
            abort_what_is_read,
            register_and_forget,
            cut,
        ]
        threads = [
            threading.Thread(target=hammer, args=(act, block)) for block, act in enumerate(acts)
        ]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        time.sleep(HAMMERING_S)
        # On a slow machine none gets through between two cuts: then one must when they are over.
        calm.set()
        while time.monotonic() < start + PATIENCE_S and not any(
            handle.state is TransferState.DONE for handle, _ in list(handles)
        ):
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []
        done = {block for handle, block in handles if handle.state is TransferState.DONE}
        for handle, _ in handles:
            assert handle.wait(5)
            assert handle.error is None or isinstance(handle.error, TransferError)
        assert done
        for block in done:
            # A later read of the same block may have failed, but only ever wrote the same bytes.
            assert pair.local.block(block) == pair.remote.block(block)
        succeeds(pair.read(pair.offer()))
        assert pair.local_is_remote()


def test_what_is_done_was_pinned(case: TransferCase) -> None:
    """The owner reuses its blocks the moment it may, under two reads by one name and aborts."""
    random = np.random.default_rng(5)
    counts: Counter[TransferState] = Counter()
    with engine_pair(16, 65_536, settings=case.settings(slice_bytes=64 << 10)) as pair:
        elsewhere = Buffer(16, 65_536, fill=0)
        pair.reader.register(elsewhere.address, elsewhere.bytes.nbytes)
        start = time.monotonic()
        stamp = 0
        while (passed := time.monotonic() - start) < PATIENCE_S and (
            passed < HAMMERING_S or len(counts) < 2
        ):
            stamp = stamp % 250 + 1
            pair.remote.bytes.fill(stamp)
            proof = pair.offer()
            pairs = [
                (local, pair.with_reader(pair.reader, local).read(proof))
                for local in (pair.local, elsewhere)
            ]
            if random.random() < 0.5:
                time.sleep(random.random() * 0.002)
                pair.owner.abort(proof.handoff_id, "preempted")
            assert take_ended(pair.owner)
            pair.remote.bytes.fill(255)
            for local, handle in pairs:
                assert handle.wait(5)
                counts[handle.state] += 1
                if handle.state is TransferState.DONE:
                    assert (local.bytes == stamp).all()
    assert set(counts) == {TransferState.DONE, TransferState.FAILED}, counts


def test_closing_under_threads_that_submit(case: TransferCase) -> None:
    with engine_pair(settings=case.settings()) as pair:
        handles: list[TransferHandle] = []
        refused = threading.Barrier(4)

        def submit() -> None:
            with contextlib.suppress(TransferCancelled):
                while True:
                    handles.append(pair.read(pair.offer()))
                    pair.reader.submit_renew(pair.owner_id, [pair.offer()])
                    time.sleep(0.001)
            refused.wait(5)

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        pair.reader.close()
        refused.wait(5)
        for thread in threads:
            thread.join()
        assert handles
        for handle in handles:
            assert handle.wait(5)
            assert handle.state in (TransferState.DONE, TransferState.FAILED)
