"""Who may be connected to an owner: readers that have proved something, and a few strangers."""

from __future__ import annotations

import threading
from collections import OrderedDict

from transfer.errors import PeerUnreachable, Phase
from transfer.transports.tcp.streams.stream import TcpStream

MAX_STRANGERS = 64
"""More than the readers that greet one owner in the same moment."""


class Places:
    """Places of connections. Thread-safe.

    Args:
        proven: how many there are for readers that have proved that they know a secret.
        strangers: how many for others. When these are taken the idlest stranger loses its own, so
            that those who say nothing keep nobody out.
    """

    def __init__(self, proven: int, strangers: int = MAX_STRANGERS) -> None:
        self._limit = proven
        self._max_strangers = strangers
        self._lock = threading.Lock()
        self._proven: set[TcpStream] = set()
        # The one that was heard of last comes last.
        self._strangers: OrderedDict[TcpStream, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Places {len(self._proven)} proven, {len(self._strangers)} strangers>"

    @property
    def proven(self) -> int:
        """How many have proved something."""
        return len(self._proven)

    def enter(self, stream: TcpStream) -> TcpStream | None:
        """A stranger comes in; gives the one that has to go for it."""
        with self._lock:
            gone = None
            if len(self._strangers) >= self._max_strangers:
                gone, _ = self._strangers.popitem(last=False)
            self._strangers[stream] = None
            return gone

    def heard(self, stream: TcpStream) -> None:
        """A stranger did something."""
        with self._lock:
            if stream in self._strangers:
                self._strangers.move_to_end(stream)

    def check_room(self) -> None:
        """See that one more could prove something.

        Raises:
            PeerUnreachable: the places for those are taken.
        """
        if len(self._proven) >= self._limit:
            raise PeerUnreachable(
                f"the owner has its {self._limit} connections", phase=Phase.CONNECT
            )

    def prove(self, stream: TcpStream) -> None:
        """A stranger becomes one of the proven.

        Raises:
            PeerUnreachable: their places are taken.
            ConnectionAbortedError: the stranger had to go.
        """
        with self._lock:
            self.check_room()
            if stream not in self._strangers:
                raise ConnectionAbortedError("another stranger needed the place")
            del self._strangers[stream]
            self._proven.add(stream)

    def leave(self, stream: TcpStream) -> None:
        """A stream ended. Idempotent."""
        with self._lock:
            self._strangers.pop(stream, None)
            self._proven.discard(stream)
