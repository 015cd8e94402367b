"""A proxy that nobody should use: what its environment makes processes do is recorded."""

from __future__ import annotations

import socket

from tests.support.network.relay import ThreadedRelay

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


class StandInProxy(ThreadedRelay):
    """Listens on loopback, notes what is said first, and hangs up; a context manager."""

    def __init__(self) -> None:
        self.contacts: list[bytes] = []
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """Sends everything through this proxy, and excepts nothing."""
        url = f"http://127.0.0.1:{self.port}"
        names = [*VARIABLES, *(name.upper() for name in VARIABLES)]
        return {**dict.fromkeys(names, url), "no_proxy": "", "NO_PROXY": "", "no_grpc_proxy": ""}

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(1.0)
            try:
                self.contacts.append(client.recv(4096))
            except OSError:
                self.contacts.append(b"")
