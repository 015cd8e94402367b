"""Messages out of a stream, however the bytes come, and the time limits of streams."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from transfer.errors import ProtocolError
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.stream import TcpStream
from transfer.transports.tcp.wire import messages
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.messages import MessageReader
from transfer.transports.tcp.wire.protocol import MessageType

LIKELY_BYTES = 64
STALL_S = 0.1


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that do not fit one are short."""
    monkeypatch.setattr(messages, "_LIKELY_BYTES", LIKELY_BYTES)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, TcpStream]]:
    """The two ends of a connection: one that sends what it likes, and ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    stream = TcpStream(accepted, "other", SocketOptions())
    with other:
        yield other, stream
    stream.close()


def in_two(other: socket.socket, data: bytes, at: int) -> threading.Timer:
    """Send ``data`` up to ``at``, and the rest a little later."""
    other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    other.sendall(data[:at])
    later = threading.Timer(0.02, other.sendall, args=(data[at:],))
    later.start()
    return later


@pytest.mark.parametrize("body_bytes", [0, 5, LIKELY_BYTES, LIKELY_BYTES + 1, 5000])
def test_several_messages_at_once(ends: tuple[socket.socket, TcpStream], body_bytes: int) -> None:
    other, stream = ends
    bodies = [bytes([number]) * body_bytes for number in range(20)]
    other.sendall(
        b"".join(
            wire.message(MessageType.RENEW, number, body) for number, body in enumerate(bodies)
        )
    )
    reader = MessageReader(stream, STALL_S)
    for number, body in enumerate(bodies):
        header, came = reader.next()
        assert (header.type, header.request_id, came) == (MessageType.RENEW, number, body)
    assert reader.empty


@pytest.mark.parametrize("at", [1, 23, 24, 30, 88, 100, 112, 190])
def test_messages_that_come_in_parts(ends: tuple[socket.socket, TcpStream], at: int) -> None:
    other, stream = ends
    bodies = [b"a" * LIKELY_BYTES, b"b" * 90]
    data = b"".join(wire.message(MessageType.RENEW, 7, body) for body in bodies)
    reader = MessageReader(stream, STALL_S * 100)
    later = in_two(other, data, at)
    assert [bytes(reader.next()[1]) for _ in bodies] == bodies
    later.join()


@pytest.mark.parametrize("begun", [1, 24, 60])
@pytest.mark.parametrize("before", [0, 1])
def test_a_message_that_stalls(
    ends: tuple[socket.socket, TcpStream], before: int, begun: int
) -> None:
    """Also when its first bytes came along with the message before."""
    other, stream = ends
    whole = wire.message(MessageType.RENEW, 1, b"x" * 40)
    other.sendall(whole * before + whole[:begun])
    reader = MessageReader(stream, STALL_S)
    for _ in range(before):
        reader.next()
    with pytest.raises(TimeoutError):
        reader.next()


def test_nothing_by_the_deadline(ends: tuple[socket.socket, TcpStream]) -> None:
    _, stream = ends
    reader = MessageReader(stream, stall_s=60.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        reader.next(started + 0.05)
    assert time.monotonic() - started >= 0.05


def test_a_message_that_trickles_is_over_by_the_deadline(
    ends: tuple[socket.socket, TcpStream],
) -> None:
    other, stream = ends
    reader = MessageReader(stream, stall_s=60.0)
    later = in_two(other, wire.message(MessageType.RENEW, 1, b"x" * 40), 30)
    with pytest.raises(TimeoutError):
        reader.next(time.monotonic() + 0.005)
    later.join()


def test_data_has_no_place_among_messages(ends: tuple[socket.socket, TcpStream]) -> None:
    other, stream = ends
    other.sendall(wire.encode_header(MessageType.DATA, 1, 1 << 30))
    with pytest.raises(ProtocolError, match="not asked for"):
        MessageReader(stream, STALL_S).next()


def test_the_first_bytes_of_something_else_can_be_looked_at(
    ends: tuple[socket.socket, TcpStream],
) -> None:
    other, stream = ends
    other.sendall(b"GET / HTTP/1.1\r\nHost: owner\r\n\r\n")
    reader = MessageReader(stream, STALL_S)
    with pytest.raises(ProtocolError, match="begins with"):
        reader.next()
    assert reader.first_bytes.startswith(b"GET /")


def test_an_end_is_an_error(ends: tuple[socket.socket, TcpStream]) -> None:
    other, stream = ends
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        MessageReader(stream, STALL_S).next()


def test_sending_ends_at_its_deadline(ends: tuple[socket.socket, TcpStream]) -> None:
    other, stream = ends
    data = bytes(range(256)) * (1 << 15)
    with pytest.raises(TimeoutError):
        stream.send(data * 8, time.monotonic() + 0.05)
    left = bytearray()
    stream.shutdown()
    while some := other.recv(1 << 20):
        left += some
    assert 0 < len(left) < len(data) * 8


def test_sending_waits_for_a_slow_reader(ends: tuple[socket.socket, TcpStream]) -> None:
    other, stream = ends
    data = bytes(range(256)) * (1 << 16)
    came = bytearray()

    def take_in() -> None:
        while len(came) < len(data):
            came.extend(other.recv(1 << 20))

    taking = threading.Thread(target=take_in)
    taking.start()
    stream.send(data, time.monotonic() + 20.0)
    taking.join(20)
    assert came == data
