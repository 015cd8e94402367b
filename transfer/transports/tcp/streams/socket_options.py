"""What every TCP socket of an engine is set to, at both ends."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

from transfer.errors import ConfigurationError, Phase
from transfer.settings import TransferSettings

_KEEPALIVE_IDLE_S = 30
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 3

# Between an address and itself nothing gets lost or in the way of others, and nothing takes time on
# the way: what is under way need only bridge the time to wake the reader, and should stay in the
# processor's cache.
_CONGESTION_WITHIN = "reno"
_BUFFER_BYTES_WITHIN = 256 << 10


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """See the settings ``socket_buffer_bytes`` and ``tcp_congestion``."""

    buffer_bytes: int = 0
    congestion: str = ""

    @classmethod
    def of(cls, settings: TransferSettings) -> SocketOptions:
        """Those that the settings ask for.

        Raises:
            ConfigurationError: the kernel has no such congestion control, or not for us.
        """
        if settings.tcp_congestion:
            with socket.socket() as trial:
                try:
                    _set_congestion(trial, settings.tcp_congestion)
                except OSError as error:
                    raise ConfigurationError(
                        f"tcp_congestion is {settings.tcp_congestion!r}, which this kernel does "
                        f"not let us use ({error.strerror}); sysctl "
                        "net.ipv4.tcp_allowed_congestion_control lists what every process may use",
                        phase=Phase.REGISTER,
                    ) from error
        return cls(settings.socket_buffer_bytes, settings.tcp_congestion)

    def apply(self, sock: socket.socket) -> bool:
        """Sets a connected socket.

        Returns:
            whether its connection is one from an IP address to itself.

        Raises:
            OSError: the connection is gone.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        within = bool(sock.getsockname()[0] == sock.getpeername()[0])
        if buffer_bytes := self.buffer_bytes or (_BUFFER_BYTES_WITHIN if within else 0):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        if self.congestion:
            _set_congestion(sock, self.congestion)
        elif within:
            # Some kernels keep even this from some processes: that is only slower.
            with suppress(OSError):
                _set_congestion(sock, _CONGESTION_WITHIN)
        return within


def _set_congestion(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
