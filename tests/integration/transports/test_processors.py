from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.processes.waiting import wait_until
from tests.support.servers.certificates import Authority
from tests.support.transfers.engines import engine_pair, succeeds
from transfer.settings import TransferSettings
from transfer.transports.tcp.streams import processors

MANY_BYTES = 64 << 20
BLOCK_BYTES = 64 << 10
GLANCE_S = 0.0005


@pytest.fixture
def two() -> Iterator[list[int]]:
    """The two processors that this thread, and threads that it starts, may use."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("only one processor may be used here")
    chosen = sorted(before)[:2]
    os.sched_setaffinity(0, chosen)
    yield chosen
    os.sched_setaffinity(0, before)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection within the host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname(), timeout=5.0)
        accepted = server.accept()[0]
    with dialled, accepted:
        yield dialled, accepted


def say_from(processor: int, sock: socket.socket) -> None:
    """Send a byte from a thread on ``processor``."""

    def send() -> None:
        os.sched_setaffinity(0, {processor})
        sock.sendall(b"!")

    with ThreadPoolExecutor(1) as other:
        other.submit(send).result()


def test_threads_of_a_read_keep_apart(two: list[int]) -> None:
    kept = []
    for number in range(4):
        with processors.apart(number, 4, MANY_BYTES):
            kept.append(os.sched_getaffinity(0))
        assert os.sched_getaffinity(0) == set(two)
    assert kept == [{two[0]}, {two[1]}, {two[0]}, {two[1]}]


def test_a_thread_keeps_to_the_processor_of_its_peer(
    two: list[int], ends: tuple[socket.socket, socket.socket]
) -> None:
    here, there = ends
    for processor in (*two, *reversed(two)):
        say_from(processor, there)
        assert here.recv(1) == b"!"
        with processors.beside_peer(here, 2, MANY_BYTES):
            assert os.sched_getaffinity(0) == {processor}
        assert os.sched_getaffinity(0) == set(two)


def test_a_thread_goes_nowhere_it_may_not_run(
    two: list[int], ends: tuple[socket.socket, socket.socket]
) -> None:
    here, there = ends
    say_from(two[1], there)
    assert here.recv(1) == b"!"
    os.sched_setaffinity(0, {two[0]})
    with processors.beside_peer(here, 2, MANY_BYTES):
        assert os.sched_getaffinity(0) == {two[0]}
    with processors.apart(1, 2, MANY_BYTES):
        assert os.sched_getaffinity(0) == {two[0]}


@pytest.mark.parametrize(("streams", "size_bytes"), [(1, MANY_BYTES), (2, 64 << 10)])
def test_nothing_is_kept_where_processors_are_free_or_bytes_few(
    streams: int, size_bytes: int, two: list[int], ends: tuple[socket.socket, socket.socket]
) -> None:
    here, there = ends
    say_from(two[0], there)
    assert here.recv(1) == b"!"
    with processors.apart(0, streams, size_bytes):
        assert os.sched_getaffinity(0) == set(two)
    with processors.beside_peer(here, streams, size_bytes):
        assert os.sched_getaffinity(0) == set(two)


def test_where_threads_may_not_be_moved_they_stay(
    two: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int, processors: list[int]) -> None:
        raise PermissionError(f"not to {processors}")

    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refused)
        with processors.apart(0, 2, MANY_BYTES):
            assert os.sched_getaffinity(0) == set(two)


def test_where_the_peer_is_unknown_a_thread_stays(two: list[int]) -> None:
    """As on systems that do not tell; here since the socket is closed."""
    gone = socket.socket()
    gone.close()
    with processors.beside_peer(gone, 2, MANY_BYTES):
        assert os.sched_getaffinity(0) == set(two)


def test_a_thread_is_free_again_after_an_error(two: list[int]) -> None:
    with pytest.raises(ConnectionResetError), processors.apart(0, 2, MANY_BYTES):
        raise ConnectionResetError
    assert os.sched_getaffinity(0) == set(two)


def masks(kind: str) -> list[frozenset[int]]:
    """Where threads of an engine whose name begins with ``kind`` may run now."""
    found = []
    for thread in threading.enumerate():
        if thread.name.startswith(kind) and thread.native_id is not None:
            try:
                found.append(frozenset(os.sched_getaffinity(thread.native_id)))
            except ProcessLookupError:  # it ended meanwhile
                continue
    return found


def test_both_ends_of_a_read_keep_to_processors_while_it_lasts(two: list[int]) -> None:
    settings = TransferSettings(transports=("tcp",), streams_per_peer=2)
    # Threads are looked at while bytes move, so one read may be over before all were seen.
    with engine_pair(MANY_BYTES // BLOCK_BYTES, BLOCK_BYTES, settings=settings) as pair:
        seen: dict[str, set[frozenset[int]]] = {"baton-read": set(), "baton-serve": set()}
        singles = {frozenset({processor}) for processor in two}

        def all_seen() -> bool:
            handle = pair.read(pair.offer())
            while not handle.wait(GLANCE_S):
                for kind, so_far in seen.items():
                    so_far.update(masks(kind))
            succeeds(handle)
            return all(singles <= so_far for so_far in seen.values())

        assert wait_until(all_seen, 30.0), seen
        assert pair.local_is_remote()
        assert wait_until(lambda: set(masks("baton-")) == {frozenset(two)}), masks("baton-")


def test_a_single_stream_is_kept_nowhere(two: list[int]) -> None:
    kept_nowhere(TransferSettings(transports=("tcp",), streams_per_peer=1), two)


def test_encrypted_streams_are_kept_nowhere(two: list[int], tmp_path: Path) -> None:
    files = Authority(tmp_path, "authority").issue("engines", "127.0.0.1")
    kept_nowhere(TransferSettings(transports=("tcp",), streams_per_peer=2, **files.settings()), two)


def kept_nowhere(settings: TransferSettings, two: list[int]) -> None:
    with engine_pair(MANY_BYTES // BLOCK_BYTES, BLOCK_BYTES, settings=settings) as pair:
        for _ in range(5):
            handle = pair.read(pair.offer())
            while not handle.wait(GLANCE_S):
                assert set(masks("baton-")) == {frozenset(two)}
            succeeds(handle)
