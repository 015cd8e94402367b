"""A proxy that nobody should use: what its environment makes processes do is recorded."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


class StandInProxy:
    """Listens on loopback, notes what is said first, and hangs up; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="stand-in-proxy", daemon=True)
        self.contacts: list[bytes] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    @property
    def environment(self) -> dict[str, str]:
        """Sends everything through this proxy, and excepts nothing."""
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        names = [*VARIABLES, *(name.upper() for name in VARIABLES)]
        return {**dict.fromkeys(names, url), "no_proxy": "", "NO_PROXY": "", "no_grpc_proxy": ""}

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # shut down
                return
            with connection:
                connection.settimeout(1.0)
                try:
                    self.contacts.append(connection.recv(4096))
                except OSError:
                    self.contacts.append(b"")
