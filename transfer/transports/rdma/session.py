"""One read over RDMA."""

from __future__ import annotations

import os
import select
import time
from collections import deque

from transfer.errors import (
    HandoffRefused,
    PeerUnreachable,
    Phase,
    RetryableError,
    TransferError,
    TransportUnavailable,
)
from transfer.transports.base import ReadSession
from transfer.transports.interrupt import Interrupt
from transfer.transports.rdma.completion import error_of
from transfer.transports.rdma.lane import Lane
from transfer.transports.rdma.lane_pool import LanePool
from transfer.transports.rdma.owner_keys import AdmittedRead, OwnerKeys
from transfer.transports.rdma.verbs.error import VerbsError, unavailable
from transfer.transports.rdma.work import Work

_RECOVERY_S = 5.0
# Bounds what a lost event can cost; nothing is known to lose one.
_LOOK_AGAIN_MS = 1000


class RdmaReadSession(ReadSession):
    """Keeps the queue pairs of its lanes busy and sleeps in between.

    Args:
        lanes: of ``pool``, to which they go back.
        keys: those of the owner, forgotten if they turn out to be stale.
    """

    def __init__(
        self,
        read: AdmittedRead,
        work: Work,
        lanes: list[Lane],
        pool: LanePool,
        keys: OwnerKeys,
    ) -> None:
        self.read_id = read.read_id
        self._read = read
        self._work = work
        self._lanes = lanes
        self._pool = pool
        self._keys = keys
        self._waiting = deque(self._work.batches)
        self._recovered = False
        self._moved = 0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def bytes_moved(self) -> int:
        return self._moved

    def run(self, interrupt: Interrupt) -> None:
        through = False
        with unavailable(Phase.READ, self._pool.peer):
            try:
                with interrupt.watched_by(self._wake):
                    self._drive(interrupt)
                through = True
            finally:
                if not through:
                    self._give_up_lanes()
        interrupt.check()

    def close(self) -> None:
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        lanes, self._lanes = self._lanes, []
        if lanes:
            self._pool.give_back(lanes)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _drive(self, interrupt: Interrupt) -> None:
        poller = self._poller()
        while self._waiting or not all(lane.idle for lane in self._lanes):
            interrupt.check()
            self._check_lanes()
            moved, error = self._step()
            self._moved += moved
            if error is not None:
                self._recover(error)
                poller = self._poller()
            elif not moved:
                self._sleep(poller)

    def _check_lanes(self) -> None:
        """See that the lanes fit the keys that the owner told."""
        for lane in self._lanes:
            if lane.far_rail >= self._read.keys.rails:
                raise TransportUnavailable(
                    "the owner told keys for fewer devices than it connected",
                    phase=Phase.READ,
                    peer=self._pool.peer,
                )

    def _step(self) -> tuple[int, TransferError | None]:
        """Take in what arrived and ask for more; gives the first lane's failure."""
        moved = 0
        for lane in self._lanes:
            arrived, status = lane.reap()
            moved += arrived
            if status:
                return moved, error_of(
                    status, str(lane.rail), self._pool.peer, self._read.handoff_id
                )
        # In turns, so that a short read is spread as well.
        while self._waiting and (free := [lane for lane in self._lanes if lane.has_room]):
            for lane in free[: len(self._waiting)]:
                try:
                    lane.post(self._waiting.popleft(), self._work)
                except VerbsError as error:
                    lane.broken = True
                    return moved, PeerUnreachable(
                        f"{lane.rail} does not take a read: {error}",
                        phase=Phase.READ,
                        peer=self._pool.peer,
                        handoff_id=self._read.handoff_id,
                    )
        return moved, None

    def _sleep(self, poller: select.poll) -> None:
        ready = {fd for fd, _ in poller.poll(_LOOK_AGAIN_MS)}
        for lane in self._lanes:
            if lane.fd in ready:
                lane.rearm()
        if self._pool.hangup_fd in ready:
            raise self._owner_gone()

    def _recover(self, error: TransferError) -> None:
        """Go on with the lanes that are left, or once with new ones."""
        if isinstance(error, HandoffRefused) and not self._read.keys_are_fresh:
            self._keys.forget()
            raise PeerUnreachable(
                f"keys of the owner's memory may have changed: {error.message}",
                phase=Phase.READ,
                peer=self._pool.peer,
                handoff_id=self._read.handoff_id,
            ) from error
        if not isinstance(error, RetryableError):
            raise error
        for lane in [lane for lane in self._lanes if lane.broken]:
            self._waiting.extendleft(reversed(lane.close()))
            self._pool.discard([lane])
            self._lanes.remove(lane)
        if self._lanes:
            return
        if self._hung_up():
            raise self._owner_gone() from error
        if self._recovered:
            raise TransportUnavailable(
                f"rdma does not work: {error.message}", phase=Phase.READ, peer=self._pool.peer
            ) from error
        self._recovered = True
        left_s = max(0.0, self._read.deadline - time.monotonic())
        self._lanes = self._pool.take_new(min(_RECOVERY_S, left_s))

    def _give_up_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        self._pool.discard(lanes)

    def _poller(self) -> select.poll:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for lane in self._lanes:
            poller.register(lane.fd, select.POLLIN)
        if self._pool.hangup_fd >= 0:
            poller.register(self._pool.hangup_fd, select.POLLRDHUP)
        return poller

    def _hung_up(self) -> bool:
        poller = select.poll()
        if self._pool.hangup_fd >= 0:
            poller.register(self._pool.hangup_fd, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _owner_gone(self) -> PeerUnreachable:
        return PeerUnreachable(
            "the connection to the owner ended",
            phase=Phase.READ,
            peer=self._pool.peer,
            handoff_id=self._read.handoff_id,
        )
