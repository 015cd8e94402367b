"""What an operator may tune about transfers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transfer.addressing import SCHEMES_BEST_FIRST, is_every_address, is_host, is_http_url
from transfer.errors import ConfigurationError, Phase

MAX_SLICE_BYTES = 1 << 30
AUTO = "auto"
MIN_SECONDS = 0.001
MAX_SECONDS = 86400.0

_CONGESTION = re.compile(r"[a-z0-9_-]{0,15}")


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Settings of one transfer engine; checked when made.

    Attributes:
        host: address to listen on and to advertise to peers.
        port: port to listen on; 0 takes a free one, which is then published.
        streams_per_peer: data streams that one read may use at once.
        max_reads_per_peer: reads from one peer that run at once; more wait in a queue.
        slice_bytes: most bytes asked for by one request.
        max_inflight_bytes: bytes of all reads that may be on their way at once; a read bigger
            than that runs alone.
        ticket_ttl_s: how long an offer lives without renewal.
        connect_timeout_s: for one connection, handshake included, at either end.
        read_deadline_s: default for a whole read, from submission to confirmation.
        stall_timeout_s: a peer that moves nothing for so long in the middle of a message is cut.
        transports: ``auto``, or the schemes that data may go by, for example ``["tcp"]``: this
            engine reads by no other and serves no other. Control messages always go over the TCP
            port. With TLS, ``auto`` leaves out what carries bytes to other hosts in the clear.
        rdma_device: RDMA devices to use, as ``mlx5_0`` or ``mlx5_0:1`` with the port, several with
            commas between; reads are spread over all. Empty takes the best one.
        rdma_gid_index: which of a port's addresses to use; -1 takes what the environment variable
            ``MC_GID_INDEX`` says, or else the best one.
        max_connections: connections that a listener keeps of readers that have proved that they
            know a ticket's secret; more are turned away. Others have a few places of their own.
        tls_ca: PEM file of the authority whose certificates are accepted. With the next two, and
            only with both, every connection is TLS 1.2 or newer, and both ends must show one.
        tls_cert: PEM file of this worker's certificate, its issuers after it.
        tls_key: PEM file of the key to it, without a password.
        tls_server_name: name that owners' certificates must be for; empty means the host of the
            address by which they are reached.
        socket_buffer_bytes: of every socket; 0 leaves it to the kernel, which tunes it, except for
            connections from an IP address to itself, which take 256 KiB.
        tcp_congestion: congestion control of every socket, such as ``cubic``. Empty leaves it to
            the kernel, except for connections from an IP address to itself: those take ``reno``,
            as BBR's pacing, of no use within a host, halves what goes through there.
        http_url: URL of the engine's own OpenAI server, told to proxies in the worker's record;
            empty if it has none.
    """

    host: str = "127.0.0.1"
    port: int = 0
    transports: str | tuple[str, ...] = AUTO
    streams_per_peer: int = 2
    max_reads_per_peer: int = 4
    slice_bytes: int = 32 << 20
    max_inflight_bytes: int = 1 << 30
    ticket_ttl_s: float = 30.0
    connect_timeout_s: float = 2.0
    read_deadline_s: float = 30.0
    stall_timeout_s: float = 10.0
    rdma_device: str = ""
    rdma_gid_index: int = -1
    max_connections: int = 512
    socket_buffer_bytes: int = 0
    tcp_congestion: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    http_url: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or len(self.host) > 255 or not is_host(self.host):
            raise wrong_setting("host", self.host, "a host name or an IP address")
        if is_every_address(self.host):
            # Peers would be told it, and find themselves there.
            raise wrong_setting(
                "host", self.host, "an address that leads other machines here, not one for all"
            )
        check_whole("port", self.port, 0, 65535)
        object.__setattr__(self, "transports", _checked_transports(self.transports))
        check_whole("streams_per_peer", self.streams_per_peer, 1, 64)
        check_whole("max_reads_per_peer", self.max_reads_per_peer, 1, 256)
        check_whole("slice_bytes", self.slice_bytes, 4096, MAX_SLICE_BYTES)
        check_whole("max_inflight_bytes", self.max_inflight_bytes, 4096, 1 << 50)
        if not isinstance(self.rdma_device, str):
            raise wrong_setting(
                "rdma_device", self.rdma_device, "names of devices with commas between"
            )
        check_whole("rdma_gid_index", self.rdma_gid_index, -1, 65535)
        check_whole("max_connections", self.max_connections, 1, 65535)
        check_whole("socket_buffer_bytes", self.socket_buffer_bytes, 0, 1 << 30)
        # The kernel's name for it has at most 15 bytes (TCP_CA_NAME_MAX).
        if not isinstance(self.tcp_congestion, str) or not _CONGESTION.fullmatch(
            self.tcp_congestion
        ):
            raise wrong_setting(
                "tcp_congestion", self.tcp_congestion, "a name like cubic, or empty"
            )
        for name in ("ticket_ttl_s", "connect_timeout_s", "read_deadline_s", "stall_timeout_s"):
            _check_seconds(name, getattr(self, name))
        if not isinstance(self.http_url, str) or (self.http_url and not is_http_url(self.http_url)):
            raise wrong_setting("http_url", self.http_url, "like http://10.0.0.1:8100, or empty")
        self._check_tls()

    def _check_tls(self) -> None:
        files = ("tls_ca", "tls_cert", "tls_key")
        for name in (*files, "tls_server_name"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > 4096:
                raise wrong_setting(name, value, "text")
        missing = [name for name in files if not getattr(self, name)]
        if missing and len(missing) < len(files):
            raise wrong_setting(missing[0], "", "set too: tls_ca, tls_cert and tls_key go together")
        if self.tls_server_name and missing:
            raise wrong_setting("tls_server_name", self.tls_server_name, "empty without tls_ca")
        if self.tls_server_name and not is_host(self.tls_server_name):
            raise wrong_setting(
                "tls_server_name", self.tls_server_name, "a host name or an IP address"
            )


def _checked_transports(value: object) -> str | tuple[str, ...]:
    if value == AUTO:
        return AUTO
    if (
        not isinstance(value, list | tuple)
        or not value
        or any(scheme not in SCHEMES_BEST_FIRST for scheme in value)
        or len(set(value)) != len(value)
    ):
        known = ", ".join(SCHEMES_BEST_FIRST)
        raise wrong_setting("transports", value, f'"{AUTO}" or a list of different ones of {known}')
    return tuple(value)


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Raises ``ConfigurationError`` unless a setting is a whole number from ``low`` to ``high``."""
    # By type: True is an int, and 2.5 lies between 2 and 3.
    if type(value) is not int or not low <= value <= high:
        raise wrong_setting(name, value, f"a whole number from {low} to {high}")


def _check_seconds(name: str, value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not MIN_SECONDS <= value <= MAX_SECONDS
    ):
        raise wrong_setting(name, value, f"from {MIN_SECONDS} to {MAX_SECONDS} seconds")


def wrong_setting(name: str, value: object, right: str) -> ConfigurationError:
    """Names a setting, what it is and what would be right."""
    return ConfigurationError(f"{name} is {value!r:.80}, must be {right}", phase=Phase.REGISTER)
