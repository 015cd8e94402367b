"""One read over RDMA."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING

from transfer.errors import (
    HandoffRefused,
    PeerUnreachable,
    Phase,
    RetryableError,
    TransferError,
    TransportUnavailable,
)
from transfer.spans import slice_plan, total_bytes
from transfer.transports.base import ReadSession
from transfer.transports.interrupt import Interrupt
from transfer.transports.rdma.completion import error_of
from transfer.transports.rdma.keys import KeyMap, cut_at_keys
from transfer.transports.rdma.queue_pair import BATCH_ROWS, Lane, Work
from transfer.transports.rdma.verbs import VerbsError, unavailable
from transfer.types import Credentials, ReadPlan

if TYPE_CHECKING:
    from transfer.transports.rdma.transport import RdmaData

_MAX_BATCH_BYTES = 4 << 20
_RECOVERY_S = 5.0
# Bounds what a lost event can cost; nothing is known to lose one.
_LOOK_AGAIN_MS = 1000


class RdmaReadSession(ReadSession):
    """Keeps the queue pairs of its lanes busy and sleeps in between.

    Args:
        deadline: monotonic time after which no new queue pairs are asked for.
    """

    def __init__(
        self,
        channel: RdmaData,
        credentials: Credentials,
        read_id: str,
        plan: ReadPlan,
        keys: KeyMap,
        lanes: list[Lane],
        *,
        keys_are_fresh: bool,
        deadline: float,
    ) -> None:
        self.read_id = read_id
        self._channel = channel
        self._handoff_id = credentials.handoff_id
        self._lanes = lanes
        self._far_rails = keys.rails
        self._keys_are_fresh = keys_are_fresh
        self._deadline = deadline
        local_keys = channel.memory.local
        plan = cut_at_keys(plan, local_keys, keys)
        even_share = -(-total_bytes(plan.local) // (len(lanes) * 2))
        batch_bytes = min(channel.slice_bytes, _MAX_BATCH_BYTES, max(4096, even_share))
        self._work = Work(slice_plan(plan, batch_bytes, BATCH_ROWS), local_keys, keys)
        self._waiting = deque(self._work.batches)
        self._recovered = False
        self._moved = 0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def bytes_moved(self) -> int:
        return self._moved

    def run(self, interrupt: Interrupt) -> None:
        through = False
        with unavailable(Phase.READ, self._channel.peer):
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
            self._channel.give_back(lanes)

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
            if lane.far_rail >= self._far_rails:
                raise TransportUnavailable(
                    "the owner told keys for fewer devices than it connected",
                    phase=Phase.READ,
                    peer=self._channel.peer,
                )

    def _step(self) -> tuple[int, TransferError | None]:
        """Take in what arrived and ask for more; gives the first lane's failure."""
        moved = 0
        for lane in self._lanes:
            arrived, status = lane.reap()
            moved += arrived
            if status:
                return moved, error_of(status, str(lane.rail), self._channel.peer, self._handoff_id)
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
                        peer=self._channel.peer,
                        handoff_id=self._handoff_id,
                    )
        return moved, None

    def _sleep(self, poller: select.poll) -> None:
        ready = {fd for fd, _ in poller.poll(_LOOK_AGAIN_MS)}
        for lane in self._lanes:
            if lane.fd in ready:
                lane.rearm()
        if self._channel.control.hangup_fd in ready:
            raise self._owner_gone()

    def _recover(self, error: TransferError) -> None:
        """Go on with the lanes that are left, or once with new ones."""
        if isinstance(error, HandoffRefused) and not self._keys_are_fresh:
            self._channel.forget_keys()
            raise PeerUnreachable(
                f"keys of the owner's memory may have changed: {error.message}",
                phase=Phase.READ,
                peer=self._channel.peer,
                handoff_id=self._handoff_id,
            ) from error
        if not isinstance(error, RetryableError):
            raise error
        for lane in [lane for lane in self._lanes if lane.broken]:
            self._waiting.extendleft(reversed(lane.close()))
            self._channel.discard([lane])
            self._lanes.remove(lane)
        if self._lanes:
            return
        if self._hung_up():
            raise self._owner_gone() from error
        if self._recovered:
            raise TransportUnavailable(
                f"rdma does not work: {error.message}", phase=Phase.READ, peer=self._channel.peer
            ) from error
        self._recovered = True
        left_s = max(0.0, self._deadline - time.monotonic())
        self._lanes = self._channel.new_lanes(min(_RECOVERY_S, left_s))

    def _give_up_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        self._channel.discard(lanes)

    def _poller(self) -> select.poll:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for lane in self._lanes:
            poller.register(lane.fd, select.POLLIN)
        if self._channel.control.hangup_fd >= 0:
            poller.register(self._channel.control.hangup_fd, select.POLLRDHUP)
        return poller

    def _hung_up(self) -> bool:
        poller = select.poll()
        if self._channel.control.hangup_fd >= 0:
            poller.register(self._channel.control.hangup_fd, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _owner_gone(self) -> PeerUnreachable:
        return PeerUnreachable(
            "the connection to the owner ended",
            phase=Phase.READ,
            peer=self._channel.peer,
            handoff_id=self._handoff_id,
        )
