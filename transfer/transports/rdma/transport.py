"""The reader's side: queue pairs to one owner, and the transport that makes both sides."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import ExitStack

from transfer.errors import (
    Phase,
    ProtocolError,
    TransportUnavailable,
)
from transfer.settings import TransferSettings
from transfer.spans import coverage
from transfer.transports.base import (
    Capabilities,
    ControlChannel,
    DataChannel,
    Listener,
    OwnerService,
    Transport,
)
from transfer.transports.rdma.device import Rail, close_rails, gid_index_wanted, open_rails
from transfer.transports.rdma.handshake import decode_answer, encode_request
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.memory import RegisteredMemory
from transfer.transports.rdma.owner import RdmaListener
from transfer.transports.rdma.queue_pair import Lane
from transfer.transports.rdma.session import RdmaReadSession
from transfer.transports.rdma.verbs import VerbsError, unavailable
from transfer.types import Credentials, DmaBuf, ReaderProcess, ReadPlan, SpanArray

logger = logging.getLogger(__name__)


class RdmaTransport(Transport):
    """One-sided reads over InfiniBand or RoCE."""

    scheme = "rdma"
    capabilities = Capabilities(same_host=False, one_sided=True, encrypted=False)

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._rails: list[Rail] = []
        self._memory = RegisteredMemory()

    def __repr__(self) -> str:
        return f"<RdmaTransport {', '.join(map(str, self._rails)) or 'closed'}>"

    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None:
        self._memory.add(address, length, dmabuf)

    def remove_memory(self, address: int, length: int) -> None:
        self._memory.remove(address, length)

    def listen(self, service: OwnerService) -> Listener:
        index = gid_index_wanted(self._settings.rdma_gid_index, os.environ)
        rails = open_rails(self._settings.rdma_device, index)
        with self._lock:
            self._rails = rails
        opened = False
        try:
            self._memory.open(rails)
            opened = True
            return RdmaListener(rails, self._memory, self._close)
        finally:
            if not opened:
                self._close()

    def open_data(self, address: str, reader: ReaderProcess, control: ControlChannel) -> RdmaData:
        with self._lock:
            rails = self._rails
        if not rails:
            raise TransportUnavailable(
                "rdma does not work: no device is open here",
                phase=Phase.CONNECT,
                peer=str(control.info.peer),
            )
        data = RdmaData(rails, self._memory, control, self._settings)
        # Better to learn now that there is no way than in the first read.
        with unavailable(Phase.CONNECT, data.peer):
            data.give_back(data.take_lanes(self._settings.connect_timeout_s))
        return data

    def _close(self) -> None:
        with self._lock:
            rails, self._rails = self._rails, []
        self._memory.close()
        close_rails(rails)


class RdmaData(DataChannel):
    """Queue pairs to one owner, and the keys of its memory. Thread-safe."""

    def __init__(
        self,
        rails: list[Rail],
        memory: RegisteredMemory,
        control: ControlChannel,
        settings: TransferSettings,
    ) -> None:
        self.memory = memory
        self.control = control
        self.peer = str(control.info.peer)
        self.slice_bytes = min(settings.slice_bytes, *(r.port.max_message_bytes for r in rails))
        self._rails = rails
        self._lanes_per_read = max(settings.streams_per_peer, len(rails))
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[list[Lane]] = []
        self._given_up: list[int] = []
        self._keys: KeyMap | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<RdmaData {self.peer} {state}>"

    def open_read(
        self, credentials: Credentials, plan: ReadPlan, timeout_s: float
    ) -> RdmaReadSession:
        deadline = time.monotonic() + timeout_s
        read_id = uuid.uuid4().hex
        if not self.memory.local.cover(plan.local):
            raise TransportUnavailable(
                "the devices here did not take the memory that is to be read into",
                phase=Phase.READ,
                peer=self.peer,
            )
        keys, fresh = self._begin(credentials, coverage(plan.remote), read_id, timeout_s)
        with unavailable(Phase.CONNECT, self.peer):
            lanes = self.take_lanes(deadline - time.monotonic())
            session = None
            try:
                session = RdmaReadSession(
                    self,
                    credentials,
                    read_id,
                    plan,
                    keys,
                    lanes,
                    keys_are_fresh=fresh,
                    deadline=deadline,
                )
                return session
            finally:
                if session is None:
                    self.discard(lanes)

    def take_lanes(self, timeout_s: float) -> list[Lane]:
        """Queue pairs for one read, idle ones or new ones.

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
            answer = self.control.exchange(RdmaTransport.scheme, request, timeout_s)
            for lane, end in zip(lanes, decode_answer(answer, len(lanes)), strict=True):
                lane.pair_with(end)
            for lane in lanes:
                lane.connect()
            connected = True
            return lanes
        finally:
            if not connected:
                self.discard(lanes)

    def new_lanes(self, timeout_s: float) -> list[Lane]:
        """As :meth:`take_lanes`, after a failure that idle ones may share."""
        with self._lock:
            idle, self._idle = self._idle, []
        self.discard([lane for lanes in idle for lane in lanes])
        return self.take_lanes(timeout_s)

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

    def forget_keys(self) -> None:
        """The owner's keys changed."""
        with self._lock:
            self._keys = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._discard_idle([lane for lanes in idle for lane in lanes])

    def _discard_idle(self, lanes: list[Lane]) -> None:
        try:
            self.discard(lanes)
        except VerbsError as error:  # nothing is under way: no read's affair
            logger.warning("queue pairs to %s stay open: %s", self.peer, error)

    def _begin(
        self, credentials: Credentials, spans: SpanArray, read_id: str, timeout_s: float
    ) -> tuple[KeyMap, bool]:
        """Leave to read, and the keys for it; whether they are new."""
        known = self._keys
        if known is not None and known.cover(spans):
            self.control.begin_read(credentials, spans, read_id, timeout_s)
            return known, False
        answers = self.control.begin_read(
            credentials, spans, read_id, timeout_s, keys_of=RdmaTransport.scheme
        )
        keys = KeyMap.joined([KeyMap.decode(answer) for answer in answers])
        if not keys.cover(spans):
            raise ProtocolError(
                "the owner's keys do not cover what it let us read",
                phase=Phase.READ,
                peer=self.peer,
            )
        with self._lock:
            self._keys = keys
        return keys, True
