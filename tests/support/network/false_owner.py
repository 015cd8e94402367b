"""Something that sits where an owner should."""

from __future__ import annotations

import socket
import threading

from transfer.transports.tcp.wire import protocol as wire


class FalseOwner:
    """Answers the messages of every connection with these bytes, one after the other, and hangs up.

    Args:
        answers: each is sent once a further message has come.
    """

    def __init__(self, *answers: bytes) -> None:
        self._answers = answers
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> FalseOwner:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as stream:
                for answer in self._answers:
                    header = wire.decode_header(stream.read(wire.HEADER.size))
                    stream.read(header.body_bytes)
                    sock.sendall(answer)
