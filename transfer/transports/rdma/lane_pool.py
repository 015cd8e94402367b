"""Queue pairs to one owner: made for a read, kept for later ones, given up when they break."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack

from transfer.transports.base import ControlChannel
from transfer.transports.rdma.handshake import SCHEME, decode_answer, encode_request
from transfer.transports.rdma.lane import Lane
from transfer.transports.rdma.rails import Rail
from transfer.transports.rdma.verbs.error import VerbsError

logger = logging.getLogger(__name__)


class LanePool:
    """Lanes to one owner, which connects them over its control connection. Thread-safe.

    Args:
        lanes_per_read: spread over ``rails``.
    """

    def __init__(self, rails: list[Rail], control: ControlChannel, lanes_per_read: int) -> None:
        self.peer = str(control.info.peer)
        self._rails = rails
        self._control = control
        self._lanes_per_read = lanes_per_read
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[list[Lane]] = []
        self._given_up: list[int] = []

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<LanePool {self.peer} {state}>"

    @property
    def hangup_fd(self) -> int:
        """See :attr:`ControlChannel.hangup_fd`."""
        return self._control.hangup_fd

    def take(self, timeout_s: float) -> list[Lane]:
        """Lanes for one read, idle ones or new ones.

        Raises:
            OSError: there are no more, or they cannot be connected.
            TransportUnavailable: the owner cannot connect them.
            PeerUnreachable: the owner is gone.
            DeadlineExceeded: it does not answer.
        """
        with self._lock:
            if self._idle:
                return self._idle.pop()
        lanes: list[Lane] = []
        connected = False
        try:
            for number in range(self._lanes_per_read):
                own_rail = number % len(self._rails)
                lanes.append(Lane(self._rails[own_rail], own_rail))
            with self._lock:
                given_up, self._given_up = self._given_up, []
            request = encode_request(
                [lane.describe(number) for number, lane in enumerate(lanes)], given_up
            )
            answer = self._control.exchange(SCHEME, request, timeout_s)
            for lane, end in zip(lanes, decode_answer(answer, len(lanes)), strict=True):
                lane.pair_with(end)
            for lane in lanes:
                lane.connect()
            connected = True
            return lanes
        finally:
            if not connected:
                self.discard(lanes)

    def take_new(self, timeout_s: float) -> list[Lane]:
        """As :meth:`take`, after a failure that idle ones may share."""
        with self._lock:
            idle, self._idle = self._idle, []
        self.discard([lane for lanes in idle for lane in lanes])
        return self.take(timeout_s)

    def give_back(self, lanes: list[Lane]) -> None:
        """Lanes without anything under way are free for the next read."""
        with self._lock:
            # With fewer lanes later reads would be slower.
            whole = len(lanes) == self._lanes_per_read
            kept = whole and not self._closed and not any(lane.broken for lane in lanes)
            if kept:
                self._idle.append(lanes)
        if not kept:
            self._discard_idle(lanes)

    def discard(self, lanes: list[Lane]) -> None:
        """Close lanes, and have the owner close its ends when it is next asked for some.

        Raises:
            VerbsError: one could not be closed; the others are.
        """
        with self._lock:
            self._given_up += [lane.far_number for lane in lanes if lane.far_number]
        with ExitStack() as closing:
            for lane in lanes:
                closing.callback(lane.close)

    def close(self) -> None:
        """Close what is idle now, and what is in use when it is given back. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._discard_idle([lane for lanes in idle for lane in lanes])

    def _discard_idle(self, lanes: list[Lane]) -> None:
        try:
            self.discard(lanes)
        except VerbsError as error:  # nothing is under way: no read's affair
            logger.warning("queue pairs to %s stay open: %s", self.peer, error)
