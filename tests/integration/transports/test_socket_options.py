from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from transfer.errors import ConfigurationError
from transfer.settings import TransferSettings
from transfer.transports.tcp.streams.socket_options import SocketOptions

Ends = tuple[socket.socket, socket.socket]


def ends(from_address: str, to_address: str) -> Ends:
    with socket.create_server((to_address, 0)) as server:
        dialled = socket.create_connection(
            server.getsockname(), source_address=(from_address, 0), timeout=5.0
        )
        return dialled, server.accept()[0]


@pytest.fixture
def within() -> Iterator[Ends]:
    """The ends of a connection from an address to itself."""
    dialled, accepted = ends("127.0.0.1", "127.0.0.1")
    with dialled, accepted:
        yield dialled, accepted


@pytest.fixture
def between() -> Iterator[Ends]:
    """The ends of a connection from one address to another."""
    dialled, accepted = ends("127.0.0.1", "127.0.0.2")
    with dialled, accepted:
        yield dialled, accepted


def congestion_of(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def kernels_choice() -> str:
    with closing(socket.socket()) as fresh:
        return congestion_of(fresh)


def allowed() -> list[str]:
    with open("/proc/sys/net/ipv4/tcp_allowed_congestion_control") as listed:
        return listed.read().split()


def test_nothing_paces_connections_within_an_address(within: Ends) -> None:
    if "reno" not in allowed():
        pytest.skip("this kernel does not let every process use reno")
    for sock in within:
        SocketOptions.of(TransferSettings()).apply(sock)
        assert congestion_of(sock) == "reno"


def test_between_addresses_the_kernel_chooses(between: Ends) -> None:
    for sock in between:
        SocketOptions.of(TransferSettings()).apply(sock)
        assert congestion_of(sock) == kernels_choice()


@pytest.mark.parametrize("connection", ["within", "between"])
def test_a_named_control_is_taken_everywhere(
    connection: str, request: pytest.FixtureRequest
) -> None:
    for name in allowed():
        for sock in request.getfixturevalue(connection):
            SocketOptions.of(TransferSettings(tcp_congestion=name)).apply(sock)
            assert congestion_of(sock) == name


def test_a_control_that_the_kernel_lacks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tcp_congestion is 'nosuch'.*sysctl"):
        SocketOptions.of(TransferSettings(tcp_congestion="nosuch"))


def buffers_of(sock: socket.socket) -> tuple[int, int]:
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
    )


def test_between_addresses_buffers_are_the_kernels(between: Ends) -> None:
    for sock in between:
        before = buffers_of(sock)
        SocketOptions.of(TransferSettings()).apply(sock)
        assert buffers_of(sock) == before


def test_within_an_address_buffers_do_not_grow(within: Ends) -> None:
    most = [int(Path(f"/proc/sys/net/core/{name}mem_max").read_text()) for name in ("w", "r")]
    for sock in within:
        SocketOptions.of(TransferSettings()).apply(sock)
        # The kernel takes twice what is asked for, socket(7).
        assert buffers_of(sock) == tuple(2 * min(256 << 10, limit) for limit in most)


@pytest.mark.parametrize("connection", ["within", "between"])
def test_buffers_are_as_asked_for(connection: str, request: pytest.FixtureRequest) -> None:
    for sock in request.getfixturevalue(connection):
        SocketOptions.of(TransferSettings(socket_buffer_bytes=65536)).apply(sock)
        assert buffers_of(sock) == (2 * 65536, 2 * 65536)
