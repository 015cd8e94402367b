"""Leave to read from one owner, and the keys of its memory, which are kept for later reads."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass

from transfer.errors import Phase, ProtocolError
from transfer.transports.base import ControlChannel
from transfer.transports.rdma.handshake import SCHEME
from transfer.transports.rdma.keys import KeyMap
from transfer.types import Credentials, SpanArray


@dataclass(frozen=True, slots=True, eq=False)
class AdmittedRead:
    """A read that the owner has given leave for.

    Attributes:
        read_id: made up for it; the owner confirms no other read by it.
        keys: of the owner's memory that is read.
        keys_are_fresh: whether the owner told them for this read.
        deadline: monotonic time when it must be over.
    """

    handoff_id: str
    read_id: str
    keys: KeyMap
    keys_are_fresh: bool
    deadline: float


class OwnerKeys:
    """Asks one owner for leave, and for its keys if they are not known. Thread-safe."""

    def __init__(self, control: ControlChannel) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._known: KeyMap | None = None

    def __repr__(self) -> str:
        return f"<OwnerKeys {self._control.info.peer} {'known' if self._known else 'not known'}>"

    def admit(self, credentials: Credentials, spans: SpanArray, deadline: float) -> AdmittedRead:
        """Ask leave to read ``spans``, sorted and joined, until ``deadline``.

        Raises:
            HandoffRefused: the owner does not allow it.
            TransportUnavailable: the owner's devices do not reach its memory.
            ProtocolError: its keys are not those of what it allowed.
            PeerUnreachable: the owner is gone.
            DeadlineExceeded: it does not answer.
        """
        read_id, timeout_s = uuid.uuid4().hex, deadline - time.monotonic()
        keys, fresh = self._known, False
        if keys is not None and keys.cover(spans):
            self._control.begin_read(credentials, spans, read_id, timeout_s)
        else:
            keys, fresh = self._ask_for_keys(credentials, spans, read_id, timeout_s), True
        return AdmittedRead(credentials.handoff_id, read_id, keys, fresh, deadline)

    def forget(self) -> None:
        """The owner's keys changed."""
        with self._lock:
            self._known = None

    def _ask_for_keys(
        self, credentials: Credentials, spans: SpanArray, read_id: str, timeout_s: float
    ) -> KeyMap:
        answers = self._control.begin_read(credentials, spans, read_id, timeout_s, keys_of=SCHEME)
        keys = KeyMap.joined([KeyMap.decode(answer) for answer in answers])
        if not keys.cover(spans):
            raise ProtocolError(
                "the owner's keys do not cover what it let us read",
                phase=Phase.READ,
                peer=str(self._control.info.peer),
            )
        with self._lock:
            self._known = keys
        return keys
