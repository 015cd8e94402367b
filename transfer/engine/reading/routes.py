"""The ways to read from one owner: the best that works, then the next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from transfer.errors import Phase, TransportUnavailable
from transfer.transports.base import ControlChannel, DataChannel, Transport
from transfer.types import ReaderProcess


class DataRoutes:
    """Opens the first route that works, and the next one when that is lost. Thread-safe.

    Args:
        routes: transports and addresses, the best one first.
        control: to the same owner.
        announce: told which route is taken and why, in words.

    Raises:
        TransportUnavailable: none works.
        PeerUnreachable: the owner is gone.
        DeadlineExceeded: the owner does not answer.
    """

    def __init__(
        self,
        routes: Iterable[tuple[Transport, str]],
        reader: ReaderProcess,
        control: ControlChannel,
        announce: Callable[[str], None],
    ) -> None:
        self._left = deque(routes)
        self._schemes = [transport.scheme for transport, _ in self._left]
        self._reader = reader
        self._control = control
        self._announce = announce
        self._lock = threading.Lock()
        # Why routes do not do, one reason each: the last one is kept, and every read may lose it.
        self._reasons: dict[tuple[Transport, str], str] = {}
        self._closed = False
        self._channel = self._open_next()

    def __repr__(self) -> str:
        return f"<DataRoutes {self._channel!r}, {len(self._left)} left>"

    @property
    def channel(self) -> DataChannel:
        """What reads go over now."""
        return self._channel

    def lose(self, channel: DataChannel, error: TransportUnavailable) -> None:
        """Go on to the next route unless another read did so already.

        Args:
            channel: the one that failed with ``error``.

        Raises:
            TransportUnavailable: there is no other route.
        """
        with self._lock:
            if channel is not self._channel:
                return
            self._reasons[self._route] = error.message
            self._channel = self._open_next()
            channel.close()
            if self._closed:
                self._channel.close()

    def close(self) -> None:
        """Close what is open. Idempotent."""
        with self._lock:
            self._closed = True
            self._channel.close()

    def _open_next(self) -> DataChannel:
        while self._left:
            route = transport, address = self._left.popleft()
            try:
                channel = transport.open_data(address, self._reader, self._control)
            except TransportUnavailable as error:
                self._reasons[route] = error.message
                continue
            self._route = route
            self._announce(f"{transport.scheme}: {self._why()}")
            return channel
        raise TransportUnavailable(
            f"no way to read from it: {self._why()}",
            phase=Phase.CONNECT,
            peer=str(self._control.info.peer),
        )

    def _why(self) -> str:
        if self._reasons:
            return "; ".join(self._reasons.values())
        if len(self._schemes) == 1:
            return "the only one that both ends allow"
        return f"the best of {', '.join(self._schemes)}"
