"""The registry of readers: one for each owner, until the owner is gone or all are shut."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.processes.waiting import wait_until
from tests.support.transfers.engines import Directory, fails, never_planned
from transfer.engine.handle import TransferHandle
from transfer.engine.memory import MemoryTable
from transfer.engine.reading.notices import release_notice, renewal_notices
from transfer.engine.reading.read import ReadOrder
from transfer.engine.reading.readers import PeerReaders
from transfer.errors import PeerUnknown, PeerUnreachable, Phase, TransferCancelled
from transfer.settings import TransferSettings
from transfer.transports.registry import Transports
from transfer.types import Credentials, PeerId, PeerInfo, WorkerRecord

OWNER = PeerId("owner", 0)
CREDENTIALS = Credentials("h", "start-1", 1, "secret", "r")
LIVES = WorkerRecord(PeerId("lives", 0), "l-1", "test", 1, ("tcp://127.0.0.1:1",), "", 0.0)


@pytest.fixture
def directory() -> Directory:
    return Directory()


@contextmanager
def readers_of(directory: Directory) -> Iterator[PeerReaders]:
    settings = TransferSettings()
    transports = Transports(settings)
    own = PeerInfo(PeerId("reader", 0), "r-1", "same", b"")
    made = PeerReaders(own, directory, transports, MemoryTable(transports), settings)
    try:
        yield made
    finally:
        made.shut()
        made.join(1.0)


@pytest.fixture
def readers(directory: Directory) -> Iterator[PeerReaders]:
    with readers_of(directory) as made:
        yield made


def order(owner: PeerId = OWNER, within_s: float = 10.0) -> ReadOrder:
    return ReadOrder(TransferHandle(owner, "h", within_s), CREDENTIALS, never_planned)


def test_one_reader_for_each_owner_till_it_left(readers: PeerReaders, directory: Directory) -> None:
    directory.publish(LIVES)
    orders = [order(), order(), order(PeerId("other", 0))]
    for one in orders:
        readers.submit(one)
        fails(one.handle, PeerUnknown)
    assert len(readers) == 2
    readers.notify(LIVES.peer, release_notice(CREDENTIALS, used=False, ttl_s=0.0))
    assert len(readers) == 3

    def only_who_lives_is_kept() -> bool:
        readers.owner_left(OWNER)
        return len(readers) == 1

    # Others that are not to be found go along, once their threads have come to rest.
    assert wait_until(only_who_lives_is_kept)


def test_reads_from_a_start_that_is_gone_fail_at_once(
    readers: PeerReaders, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def wait_for(peer: PeerId, timeout_s: float) -> WorkerRecord:
        asked.set()
        answer.wait(5.0)
        raise PeerUnknown("not there", phase=Phase.DISCOVER)

    monkeypatch.setattr(directory, "wait_for", wait_for)
    readers.submit(one := order())
    assert asked.wait(5.0)
    readers.owner_started(OWNER, CREDENTIALS.incarnation)
    assert not one.handle.wait(0.05)
    readers.owner_started(OWNER, "start-2")
    fails(one.handle, PeerUnreachable, "it started anew")
    answer.set()


@pytest.mark.parametrize(("read_s", "waits_s"), [(10.0, 2.0), (1.0, 1.0)])
def test_an_owner_that_nobody_knows_is_waited_for(
    directory: Directory,
    monkeypatch: pytest.MonkeyPatch,
    read_s: float,
    waits_s: float,
) -> None:
    waited_s: list[float] = []

    def wait_for(peer: PeerId, timeout_s: float) -> WorkerRecord:
        waited_s.append(timeout_s)
        raise PeerUnknown("not there", phase=Phase.DISCOVER)

    monkeypatch.setattr(directory, "wait_for", wait_for)
    with readers_of(directory) as readers:
        readers.submit(one := order(within_s=read_s))
        fails(one.handle, PeerUnknown)
    assert waited_s[0] == pytest.approx(waits_s, abs=0.5)


def test_who_is_shut_takes_nothing_more(readers: PeerReaders) -> None:
    readers.shut()
    with pytest.raises(TransferCancelled, match="the engine is closed"):
        readers.submit(order())
    with pytest.raises(TransferCancelled, match="the engine is closed"):
        readers.notify(OWNER, release_notice(CREDENTIALS, used=True, ttl_s=1.0))
    readers.shut()
    readers.join(1.0)
    assert repr(readers) == "<PeerReaders of 0 peers>"


def test_renewals_go_by_start_and_are_not_too_many_at_once() -> None:
    of_two_starts = [
        Credentials(f"h{number}", f"start-{number % 2}", number, "secret", "r")
        for number in range(700)
    ]
    notices = list(renewal_notices(of_two_starts, 30.0))
    assert [len(one.credentials) for one in notices] == [256, 94, 256, 94]
    for one in notices:
        assert len({credentials.incarnation for credentials in one.credentials}) == 1
    told = [credentials for one in notices for credentials in one.credentials]
    assert sorted(told, key=lambda one: one.fence) == of_two_starts
    assert list(renewal_notices([], 30.0)) == []
