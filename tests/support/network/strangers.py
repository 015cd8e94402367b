"""Connections to an owner that prove nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from tests.support.network import raw_connections


@contextlib.contextmanager
def strangers(address: str, count: int, first: bytes = b"") -> Iterator[None]:
    """So many connections that say ``first`` and then nothing; those that are cut come again."""
    stop = threading.Event()

    def stay() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), raw_connections.connect(address) as sock:
                sock.sendall(first)
                sock.settimeout(0.05)
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        if not sock.recv(4096):
                            break
            stop.wait(0.05)

    threads = [threading.Thread(target=stay, name="stranger") for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
