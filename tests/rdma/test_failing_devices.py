"""Devices and kernels that refuse what always works, which no real ones can be made to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from tests.support.transfers.engines import Pair, fails, succeeds
from tests.support.transfers.rdma_ends import Ends
from transfer.errors import TransportUnavailable
from transfer.settings import TransferSettings
from transfer.transports.rdma.handshake import End, encode_request
from transfer.transports.rdma.local_end import LocalEnd
from transfer.transports.rdma.owner import RdmaAttachment
from transfer.transports.rdma.verbs.completion_queue import CompletionQueue
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.transports.rdma.verbs.queue_pair import QueuePair

LANES = TransferSettings().streams_per_peer


def broken(*_: object) -> None:
    raise VerbsError(errno.EIO, "the device failed")


def fail_first_close(patch: pytest.MonkeyPatch) -> list[int]:
    """Have the first queue pair that is closed stay open; the numbers of all that are."""
    closed: list[int] = []
    close = QueuePair.close

    def close_but_first(pair: QueuePair) -> None:
        closed.append(pair.number)
        if len(closed) == 1:
            broken()
        close(pair)

    patch.setattr(QueuePair, "close", close_but_first)
    return closed


@pytest.mark.parametrize("call", ["poll", "rearm"])
def test_a_device_that_fails_half_way_is_left_for_tcp(
    either: Pair, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    succeeds(either.read(either.offer()))
    monkeypatch.setattr(CompletionQueue, call, broken)
    either.local.bytes.fill(0)
    succeeds(either.read(either.offer()))
    assert either.local_is_remote()
    assert "go over tcp: rdma does not work: [Errno 5] the device failed" in caplog.text


def test_all_queue_pairs_are_closed_though_one_cannot_be(
    either: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    succeeds(either.read(either.offer()))
    closed = fail_first_close(monkeypatch)
    monkeypatch.setattr(CompletionQueue, "poll", broken)
    succeeds(either.read(either.offer()))
    assert either.local_is_remote()
    assert len(set(closed)) == LANES
    assert "go over tcp: rdma does not work" in caplog.text


def test_after_a_queue_pair_broke_later_reads_have_all_of_them_again(
    pair: Pair, attachments: list[RdmaAttachment], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[int] = set()
    post = QueuePair.post_reads

    def fail_first(self: QueuePair, *args: object) -> None:
        fresh = not used
        used.add(self.number)
        if fresh:
            broken()
        post(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(QueuePair, "post_reads", fail_first)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    before, used = used, {0}
    pair.local.bytes.fill(0)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    assert len(used - {0}) == LANES
    assert not used & before
    (attachment,) = attachments
    assert len(attachment._ends) == LANES


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Nobody in this process can open anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_descriptor_nothing_stays_behind(
    pair: Pair, attachments: list[RdmaAttachment]
) -> None:
    succeeds(pair.read(pair.offer()))
    (attachment,) = attachments
    with no_descriptor_left():
        # The first one has queue pairs, but cannot be woken. The second one has none.
        for _ in range(2):
            fails(pair.read(pair.offer()), TransportUnavailable, "Too many open files")
    pair.local.bytes.fill(0)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()
    assert len(attachment._ends) == LANES


def test_an_owner_keeps_no_queue_pair_that_the_reader_does_not_learn_of(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = set(ends.attachment._ends)
    first = ends.lane.describe(0)
    other_link = replace(first, ethernet=not first.ethernet)
    with pytest.raises(TransportUnavailable, match="Ethernet"):
        ends.attachment.exchange(encode_request([first, other_link], ()))
    assert set(ends.attachment._ends) == known

    connect = LocalEnd.connect

    def fail_second(self: LocalEnd, peer: End) -> None:
        if len(ends.attachment._ends) > len(known) + 1:
            broken()
        connect(self, peer)

    monkeypatch.setattr(LocalEnd, "connect", fail_second)
    with pytest.raises(TransportUnavailable, match="cannot connect a queue pair"):
        ends.attachment.exchange(encode_request([first, first], ()))
    assert set(ends.attachment._ends) == known


def test_an_owner_closes_all_its_queue_pairs_though_one_cannot_be(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = [ends.lane, ends.new_lane(), ends.new_lane()]
    numbers = set(ends.attachment._ends)
    assert len(numbers) == len(lanes)
    with monkeypatch.context() as patch:
        closed = fail_first_close(patch)
        with pytest.raises(VerbsError):
            ends.attachment.close()
    assert set(closed) == numbers
