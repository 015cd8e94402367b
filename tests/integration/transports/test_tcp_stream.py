from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.span_cursor import SpanCursor
from transfer.transports.tcp.streams.stream import TcpStream

MIB = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[TcpStream, socket.socket]]:
    """A stream, and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream = TcpStream.connect("127.0.0.1", server.getsockname()[1], 5.0, SocketOptions())
        other, _ = server.accept()
    with other:
        yield stream, other
    stream.close()


def taken_in(stream: TcpStream, size: int) -> tuple[bytes, list[int]]:
    """What came, and what was told of it on the way."""
    memory = np.zeros(size, dtype=np.uint8)
    spans = np.array([[memory.ctypes.data, size // 2]] * 2, dtype=np.uint64)
    spans[1] += np.array([size // 2, 0], dtype=np.uint64)
    told: list[int] = []
    stream.receive_spans(SpanCursor(spans), told.append)
    return memory.tobytes(), told


@pytest.mark.parametrize("size", [2, 2 * MIB, 4 * MIB, 12 * MIB + 2])
def test_spans_of_any_size_and_then_a_few_bytes(
    pair: tuple[TcpStream, socket.socket], size: int
) -> None:
    stream, other = pair
    data = os.urandom(size)
    sender = threading.Thread(target=other.sendall, args=(data + b"end",))
    sender.start()
    came, told = taken_in(stream, size)
    sender.join()
    assert came == data
    assert sum(told) == size
    assert stream.receive(3) == b"end"


def test_a_slow_stream_arrives_whole(pair: tuple[TcpStream, socket.socket]) -> None:
    stream, other = pair
    data = os.urandom(4 * MIB)

    def trickle() -> None:
        for at in range(0, len(data), 128 << 10):
            threading.Event().wait(0.03)
            other.sendall(data[at : at + (128 << 10)])

    sender = threading.Thread(target=trickle)
    sender.start()
    came, told = taken_in(stream, len(data))
    sender.join()
    assert came == data
    assert sum(told) == len(data)


def test_the_end_of_a_stream_within_spans_is_an_error(
    pair: tuple[TcpStream, socket.socket],
) -> None:
    stream, other = pair
    other.sendall(b"x" * 1000)
    other.close()
    with pytest.raises(ConnectionResetError, match="closed by the peer"):
        taken_in(stream, 8 * MIB)


def test_shutdown_ends_a_wait_for_much(pair: tuple[TcpStream, socket.socket]) -> None:
    stream, _ = pair
    cutter = threading.Timer(0.1, stream.shutdown)
    cutter.start()
    with pytest.raises(ConnectionResetError):
        taken_in(stream, 8 * MIB)
    cutter.join()
