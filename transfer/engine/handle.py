"""One read as its submitter sees it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from transfer.errors import DeadlineExceeded, Phase, TransferCancelled, TransferError
from transfer.transports.base import ReadSession
from transfer.transports.interrupt import Interrupt
from transfer.types import PeerId


class TransferState(StrEnum):
    QUEUED = "queued"
    CONNECTING = "connecting"
    READING = "reading"
    CONFIRMING = "confirming"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether it never changes any more."""
        return self in _FINAL


_FINAL = (TransferState.DONE, TransferState.FAILED, TransferState.CANCELLED)


@dataclass(frozen=True, slots=True)
class TransferTimings:
    """How long a read took, in seconds.

    Attributes:
        read_s: while bytes came; 0 if it did not get that far.
        total_s: from submission to the end, or until now.
    """

    read_s: float
    total_s: float


class TransferHandle:
    """Poll ``state`` until it is final. Every member may be used from any thread.

    ``DONE`` means that every byte is there and that the owner confirmed that its blocks stayed
    pinned throughout. Once the state is final, whichever it is, local memory is not written to
    any more.
    """

    def __init__(self, owner: PeerId, handoff_id: str, deadline_s: float) -> None:
        self.owner = owner
        self.handoff_id = handoff_id
        self._deadline_s = deadline_s
        self.deadline = time.monotonic() + deadline_s
        """When the read fails at the latest, on the monotonic clock."""
        self.interrupt = Interrupt()
        """For the engine."""
        self._lock = threading.Lock()
        self._final = threading.Event()
        self._state = TransferState.QUEUED
        self._error: TransferError | None = None
        self._cancelled = False
        self._session: ReadSession | None = None
        self._bytes_before = 0
        self._history = [(self._state, time.monotonic())]
        self._on_final: list[Callable[[TransferHandle], None]] = []

    def __repr__(self) -> str:
        return (
            f"<TransferHandle {self.handoff_id} from {self.owner} {self._state.value}, "
            f"{self.bytes_moved} bytes>"
        )

    @property
    def state(self) -> TransferState:
        return self._state

    @property
    def error(self) -> TransferError | None:
        """Why it failed or was cancelled; None otherwise."""
        return self._error

    @property
    def bytes_moved(self) -> int:
        """Bytes written to local memory so far, those of a broken first try included. Grows once
        per system call, that is by up to a slice."""
        with self._lock:
            session = self._session
            return self._bytes_before + (session.bytes_moved if session else 0)

    @property
    def timings(self) -> TransferTimings:
        with self._lock:
            history = list(self._history)
        if not history[-1][0].is_final:
            history.append((history[-1][0], time.monotonic()))
        return TransferTimings(
            read_s=sum(
                until - since
                for (state, since), (_, until) in itertools.pairwise(history)
                if state is TransferState.READING
            ),
            total_s=history[-1][1] - history[0][1],
        )

    def cancel(self) -> None:
        """Stop the read. Does not block; the state becomes ``CANCELLED`` at once unless bytes
        are on their way, then as soon as they are stopped. The hand-off is neither released nor
        aborted by this. No effect on a final state."""
        error = TransferCancelled(
            "cancelled", phase=Phase.READ, peer=str(self.owner), handoff_id=self.handoff_id
        )
        self.stop(error, cancelled=True)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the state is final; False if it is not within ``timeout_s``."""
        return self._final.wait(timeout_s)

    # For the engine.

    def stop(self, error: TransferError, *, cancelled: bool = False) -> None:
        """Make the read end with ``error``. Any thread; does not block.

        Outside of ``READING`` no thread can write to local memory, so the state is final at once
        even if a thread of the engine has yet to notice.
        """
        with self._lock:
            if self._state.is_final or self.interrupt.error is not None:
                return
            self._cancelled = cancelled
            # Its watchers only shut sockets down and wake waiters.
            self.interrupt.set(error)
            ended = self._state is not TransferState.READING and self._end(error)
        if ended:
            self._announce()

    def time_out(self) -> None:
        """Stop the read because its deadline passed."""
        self.stop(
            DeadlineExceeded(
                f"not done within {self._deadline_s} s",
                phase=Phase.READ,
                peer=str(self.owner),
                handoff_id=self.handoff_id,
            )
        )

    def advance(self, state: TransferState) -> None:
        """Go on to a state that is not final.

        Raises:
            TransferError: the read was stopped meanwhile.
        """
        with self._lock:
            self.interrupt.check()
            self._switch(state)

    def attach(self, session: ReadSession) -> None:
        """Count the bytes of ``session`` from now on."""
        with self._lock:
            if self._session is not None:
                self._bytes_before += self._session.bytes_moved
            self._session = session

    def finish(self, error: TransferError | None) -> None:
        """The engine is through with it; an error from :meth:`stop` wins over ``error``."""
        with self._lock:
            ended = self._end(self.interrupt.error or error)
        if ended:
            self._announce()

    def when_final(self, callback: Callable[[TransferHandle], None]) -> None:
        """Call ``callback`` once the state is final, on the thread that made it so."""
        with self._lock:
            if not self._state.is_final:
                self._on_final.append(callback)
                return
        callback(self)

    def _end(self, error: TransferError | None) -> bool:
        if self._state.is_final:
            return False
        self._error = error
        if error is None:
            self._switch(TransferState.DONE)
        elif self._cancelled:
            self._switch(TransferState.CANCELLED)
        else:
            self._switch(TransferState.FAILED)
        return True

    def _announce(self) -> None:
        self._final.set()
        callbacks, self._on_final = self._on_final, []
        for callback in callbacks:
            callback(self)

    def _switch(self, state: TransferState) -> None:
        self._history.append((state, time.monotonic()))
        self._state = state
