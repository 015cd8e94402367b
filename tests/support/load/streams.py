"""A client of streamed answers that reads event by event."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self


class Stream:
    """One streamed request over a connection of its own.

    Args:
        url: the application's.
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        body: the request; ``stream`` and usage are set here.
        receive_bytes: how much the kernel may hold for this client before it reads.
    """

    def __init__(
        self,
        url: str,
        path: str,
        body: dict[str, Any],
        timeout_s: float = 120.0,
        receive_bytes: int | None = None,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.ended = False
        self._path = path
        options = {"stream": True, "stream_options": {"include_usage": True}}
        self._body = json.dumps({**body, **options})
        self._connection = http.client.HTTPConnection(
            url.removeprefix("http://"), timeout=timeout_s
        )
        if receive_bytes is not None:
            # Before it connects: that is when the two ends agree on how large a window can get.
            self._connection.sock = socket.socket()
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            self._connection.sock.settimeout(timeout_s)
            self._connection.sock.connect((self._connection.host, self._connection.port))

    def __enter__(self) -> Self:
        self.send()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def send(self) -> None:
        """Sends the request, waits for nothing."""
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", self._path, self._body, headers)

    def leave(self) -> None:
        """Closes the connection, as a client that goes away."""
        self._connection.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The events that are left, as they come; sets ``ended`` at ``[DONE]``."""
        response = self._connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: [DONE]"):
                self.ended = True
            elif line.startswith(b"data: "):
                self.events.append(json.loads(line.removeprefix(b"data: ")))
                yield self.events[-1]

    @property
    def text(self) -> str:
        """The answer's text so far."""
        choices = [event["choices"][0] for event in self.events if event.get("choices")]
        texts = [choice.get("text", choice.get("delta", {}).get("content")) for choice in choices]
        return "".join(text or "" for text in texts)

    @property
    def finish_reasons(self) -> list[str]:
        """All that there were; one is right."""
        choices = [event["choices"][0] for event in self.events if event.get("choices")]
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]

    @property
    def usage(self) -> list[dict[str, Any]]:
        """All that there were; one is right."""
        return [event["usage"] for event in self.events if event.get("usage")]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Error events."""
        return [event["error"] for event in self.events if "error" in event]
