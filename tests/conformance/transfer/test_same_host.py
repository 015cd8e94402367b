"""What only shm can get wrong: whose memory it is, if it may be read, how long it is pinned."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.support.processes.waiting import wait_until
from tests.support.transfers.cases import TransferCase, why_no_process_memory
from tests.support.transfers.engines import Buffer, Pair, engine_pair, fails, succeeds, take_ended
from transfer.engine.handle import TransferState
from transfer.errors import (
    ConfigurationError,
    FatalError,
    HandoffRefused,
    Phase,
    TransportUnavailable,
)
from transfer.transports import process_memory
from transfer.transports.shm import address as shm_address
from transfer.transports.shm.address import Host, ShmAddress
from transfer.types import ReadPlan, SpanArray

Copy = Callable[[int, SpanArray, SpanArray], int]
real_copy: Copy = process_memory.read_process_memory


@pytest.fixture
def case() -> TransferCase:
    """Only shm."""
    if why := why_no_process_memory():
        pytest.skip(why)
    return TransferCase("shm", {"transports": ["shm"]})


@pytest.fixture
def auto(case: TransferCase, caplog: pytest.LogCaptureFixture) -> Iterator[Pair]:
    """A pair that may choose, and says what it chose in ``caplog``."""
    caplog.set_level(logging.INFO, "transfer")
    with engine_pair(settings=TransferCase("auto").settings()) as made:
        yield made


def routes_said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "reads from" in record.getMessage()]


def refuse(code: int, after: int = 0) -> Copy:
    """A copy that the kernel refuses, after so many that it does not."""
    left = [after]

    def copy(pid: int, local: SpanArray, remote: SpanArray) -> int:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        left[0] -= 1
        return real_copy(pid, local, remote)

    return copy


def use(monkeypatch: pytest.MonkeyPatch, copy: Copy) -> None:
    monkeypatch.setattr(process_memory, "read_process_memory", copy)


def change_address(pair: Pair, monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """The owner says of itself what is not so."""
    listener = pair.owner._listeners[1]
    wrong = replace(ShmAddress.parse(listener.address), **changed)  # type: ignore[arg-type]
    conversation = pair.owner._listeners[0]._service  # type: ignore[attr-defined]
    conversation.advertise((str(wrong),))


def test_same_host_is_used_by_itself(auto: Pair, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        succeeds(auto.read(auto.offer()))
    assert auto.local_is_remote()
    assert routes_said(caplog) == ["reads from owner/0 go over shm: the best of shm, tcp"]
    record = auto.directory.lookup(auto.owner_id)
    assert record is not None
    assert [address.partition(":")[0] for address in record.addresses] == ["tcp", "shm"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"host": Host("0", 1)}, "another host"),
        ({"pid": 1}, "is not the owner|forbids|not there"),
        ({"pid": 4194304}, "is not on this host"),
        ({"seal": bytes(16)}, "is not the owner"),
        ({"seal_address": 4096}, "not there"),
    ],
    ids=["host", "other process", "no process", "seal", "memory"],
)
def test_an_owner_that_is_not_where_it_says_is_not_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], why: str
) -> None:
    change_address(pair, monkeypatch, **changed)
    fails(pair.read(pair.offer()), TransportUnavailable, why)
    assert not pair.local.bytes.any()


def test_an_owner_in_a_clone_of_this_machine_is_read_over_tcp(
    auto: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clones have the same boot id; what has this pid there has none here."""
    change_address(auto, monkeypatch, pid=4194304)
    for _ in range(2):
        succeeds(auto.read(auto.offer()))
    assert auto.local_is_remote()
    (said,) = routes_said(caplog)
    assert "go over tcp" in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_that_nobody_copied_is_never_taken_for_read(
    case: TransferCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(pid: int, local: SpanArray, remote: SpanArray) -> int:
        if threading.current_thread().name == "baton-copy":
            raise MemoryError
        return real_copy(pid, local, remote)

    with engine_pair(2048, settings=case.settings(streams_per_peer=2)) as pair:
        use(monkeypatch, copy)
        fails(pair.read(pair.offer()), FatalError, "bytes were copied")


def test_another_pid_namespace_is_another_host(
    auto: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = Host.of_this_process()
    change_address(auto, monkeypatch, host=replace(here, pid_namespace=1))
    succeeds(auto.read(auto.offer()))
    assert auto.local_is_remote()
    assert [line.partition("over ")[2] for line in routes_said(caplog)] == [
        "tcp: shm does not work: the owner is in another pid namespace"
    ]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EFAULT])
def test_what_the_kernel_forbids_goes_over_tcp_and_is_said_once(
    auto: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    use(monkeypatch, refuse(code))
    for _ in range(3):
        auto.local.bytes.fill(0)
        succeeds(auto.read(auto.offer()))
        assert auto.local_is_remote()
    (said,) = routes_said(caplog)
    assert "go over tcp: shm does not work" in said


def test_shm_that_is_lost_half_way_goes_on_over_tcp(
    case: TransferCase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "transfer")
    tuning = TransferCase("auto").settings(slice_bytes=64 << 10)
    with engine_pair(64, 65_536, settings=tuning) as pair:
        use(monkeypatch, refuse(errno.EFAULT, after=20))
        handle = pair.read(pair.offer())
        succeeds(handle)
        assert pair.local_is_remote()
        assert handle.bytes_moved > pair.remote.bytes.nbytes
        succeeds(pair.read(pair.offer()))
    assert [line.partition("over ")[2][:4] for line in routes_said(caplog)] == ["shm:", "tcp:"]


def test_shm_that_is_lost_fails_the_read_when_nothing_else_is_allowed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, refuse(errno.EPERM, after=2))
    fails(pair.read(pair.offer()), TransportUnavailable, "forbids")
    use(monkeypatch, real_copy)
    succeeds(pair.read(pair.offer()))


def test_an_owner_that_dies_while_it_is_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its control connection goes on here, so the second attempt gets further than it would."""
    caplog.set_level(logging.INFO, "transfer")
    use(monkeypatch, refuse(errno.ESRCH, after=2))
    fails(pair.read(pair.offer()), TransportUnavailable, "is not on this host")
    assert re.search(r"will try once more: .*process \d+ is gone", caplog.text)


def test_small_rows_are_read_though_no_thread_can_be_started_to_sort_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_none_to_sort(thread: threading.Thread) -> None:
        if thread.name.startswith("baton-sort"):
            raise RuntimeError("can't start new thread")
        start(thread)

    succeeds(pair.read(pair.offer()))  # with the threads that a reader has anyway
    pair.local.bytes.fill(0)
    blocks = range(62, -1, -2)
    plan = ReadPlan(pair.local.spans(blocks), pair.remote.spans(blocks))
    monkeypatch.setattr(threading.Thread, "start", start_none_to_sort)
    succeeds(pair.read(pair.offer(), plan))
    assert all(pair.local.block(number) == pair.remote.block(number) for number in blocks)
    assert not any(pair.local.block(1))


def test_copies_that_stop_short_go_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(pid: int, local: SpanArray, remote: SpanArray) -> int:
        local, remote = local[:1].copy(), remote[:1].copy()
        local[0, 1] = remote[0, 1] = min(int(local[0, 1]), 1000)
        return real_copy(pid, local, remote)

    use(monkeypatch, short)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()


def test_a_copy_of_nothing_is_no_copy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda pid, local, remote: 0)
    fails(pair.read(pair.offer()), TransportUnavailable, "nothing")


def test_of_two_reads_under_one_name_only_the_one_that_released_counts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Buffer(64, fill=0)
    pair.reader.register(elsewhere.address, elsewhere.bytes.nbytes)
    slow = elsewhere.spans([0])[0, 0]
    go_on = threading.Event()

    def copy(pid: int, local: SpanArray, remote: SpanArray) -> int:
        if local[0, 0] == slow:
            assert go_on.wait(5)
        return real_copy(pid, local, remote)

    use(monkeypatch, copy)
    proof, blocks = pair.offer(), range(64)
    second = pair.read(proof, ReadPlan(elsewhere.spans(blocks), pair.remote.spans(blocks)))
    assert wait_until(lambda: second.state is TransferState.READING)
    succeeds(pair.read(proof))
    assert take_ended(pair.owner)
    pair.remote.bytes.fill(7)  # what the owner may do now
    go_on.set()
    fails(second, HandoffRefused, "another read")
    assert (elsewhere.bytes == 7).all()


def test_a_closed_owner_is_not_read_though_its_process_lives(pair: Pair) -> None:
    listener = pair.owner._listeners[1]
    succeeds(pair.read(pair.offer()))
    listener.close()
    listener.close()
    assert "closed" in repr(listener)
    fails(pair.read(pair.offer()), TransportUnavailable, "not the owner|not there")


def test_a_host_without_identity_is_not_served_over_shm(
    case: TransferCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(cls: type[Host]) -> Host:
        raise TransportUnavailable("no /proc", phase=Phase.CONNECT)

    monkeypatch.setattr(shm_address.Host, "of_this_process", classmethod(unknown))
    with engine_pair(settings=TransferCase("auto").settings()) as pair:
        assert [address.partition(":")[0] for address in pair.owner.addresses] == ["tcp"]
        succeeds(pair.read(pair.offer()))
        with pytest.raises(ConfigurationError, match="no /proc"):
            pair.engine("forced", settings=case.settings()).start()
