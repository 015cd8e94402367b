"""Transfer engines in one process: a shared directory of peers, buffers and offers."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.processes.waiting import SLOWNESS
from tests.support.transfers.handoffs import live
from transfer.discovery.base import Discovery, Listener, PeerEvent, PeerEventKind
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.handoff import EndedHandoff, Handoff, Offer
from transfer.errors import PeerUnknown, Phase, TransferError
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.types import Credentials, PeerId, PeerInfo, Planner, ReadPlan, SpanArray, WorkerRecord

LAYOUT_HASH = "same"


class Directory(Discovery):
    """Discovery of a whole test: what one engine publishes, all see at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[PeerId, WorkerRecord] = {}
        self._listeners: list[Listener] = []

    def publish(self, record: WorkerRecord) -> None:
        with self._lock:
            known = record.peer in self._records
            self._records[record.peer] = record
        self._tell(PeerEventKind.UPDATED if known else PeerEventKind.JOINED, record)

    def withdraw(self, peer: PeerId) -> None:
        with self._lock:
            record = self._records.pop(peer, None)
        if record is not None:
            self._tell(PeerEventKind.LEFT, record)

    def lookup(self, peer: PeerId) -> WorkerRecord | None:
        return self._records.get(peer)

    def wait_for(self, peer: PeerId, timeout_s: float) -> WorkerRecord:
        record = self.lookup(peer)
        if record is None:
            raise PeerUnknown(f"not in {timeout_s} s", phase=Phase.DISCOVER, peer=str(peer))
        return record

    def peers(self) -> tuple[WorkerRecord, ...]:
        with self._lock:
            return tuple(sorted(self._records.values(), key=lambda record: record.peer))

    def ready(self, timeout_s: float) -> None:
        pass  # it always is

    @property
    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        pass  # it is everybody's

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        with self._lock:
            self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def move(self, peer: PeerId, *addresses: str) -> None:
        """Send readers of ``peer`` elsewhere, without telling anybody."""
        with self._lock:
            self._records[peer] = replace(self._records[peer], addresses=addresses)

    def _tell(self, kind: PeerEventKind, record: WorkerRecord) -> None:
        for listener in list(self._listeners):
            listener(PeerEvent(kind, record))


class Buffer:
    """Memory of ``num_blocks`` blocks."""

    def __init__(self, num_blocks: int, block_bytes: int = 4096, fill: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.bytes: NDArray[np.uint8]
        if fill is None:
            random = np.random.default_rng(num_blocks)
            self.bytes = random.integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
        else:
            self.bytes = np.full(num_blocks * block_bytes, fill, dtype=np.uint8)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def spans(self, block_ids: list[int] | NDArray[np.int64] | range) -> SpanArray:
        return block_spans(
            self.address, self.block_bytes, self.block_bytes, np.array(block_ids, dtype=np.int64)
        )

    def block(self, block_id: int) -> bytes:
        start = block_id * self.block_bytes
        return self.bytes[start : start + self.block_bytes].tobytes()


def make_engine(
    directory: Directory,
    name: str,
    *,
    incarnation: str = "",
    layout_hash: str = LAYOUT_HASH,
    layout: bytes = b"layout",
    settings: TransferSettings | None = None,
) -> TransferEngine:
    """An engine that is not started yet."""
    return TransferEngine(
        peer=PeerId(name, 0),
        incarnation=incarnation or f"{name}-1",
        role="test",
        tp_size=1,
        layout_hash=layout_hash,
        layout=layout,
        discovery=directory,
        settings=settings or TransferSettings(),
    )


@dataclass
class Pair:
    """An owner and a reader, each with a registered buffer."""

    directory: Directory
    owner: TransferEngine
    reader: TransferEngine
    remote: Buffer
    local: Buffer
    settings: TransferSettings
    owner_id: PeerId = field(default_factory=lambda: PeerId("owner", 0))

    def engine(self, name: str, **arguments: Any) -> TransferEngine:
        """One more engine in the same directory, with the same settings unless told otherwise."""
        return make_engine(self.directory, name, **{"settings": self.settings, **arguments})

    def with_reader(self, reader: TransferEngine, local: Buffer) -> Pair:
        """The same owner with another reader."""
        return replace(self, reader=reader, local=local)

    def offer(
        self,
        *,
        grant: SpanArray | None = None,
        readers: int = 1,
        ttl_s: float = 30.0,
    ) -> Credentials:
        """Offer everything, or ``grant``; gives what reader ``r`` needs."""
        proof = Credentials(uuid.uuid4().hex, "owner-1", 17, uuid.uuid4().hex, "r")
        spans = self.remote.spans(range(self.remote.num_blocks)) if grant is None else grant
        self.owner.offer(Offer(proof.handoff_id, proof.fence, proof.secret, spans, readers, ttl_s))
        return proof

    def read(
        self,
        proof: Credentials,
        plan: ReadPlan | Planner | None = None,
        *,
        deadline_s: float = 20.0 * SLOWNESS,
    ) -> TransferHandle:
        """Begin to read ``plan``, by default every block to where it is at the owner."""
        if plan is None:
            blocks = range(min(self.local.num_blocks, self.remote.num_blocks))
            plan = ReadPlan(self.local.spans(blocks), self.remote.spans(blocks))
        if isinstance(plan, ReadPlan):
            fixed = plan
            return self.reader.submit_read(self.owner_id, proof, lambda _: fixed, deadline_s)
        return self.reader.submit_read(self.owner_id, proof, plan, deadline_s)

    def local_is_remote(self) -> bool:
        return bool(np.array_equal(self.local.bytes, self.remote.bytes))


@contextmanager
def engine_pair(
    num_blocks: int = 64,
    block_bytes: int = 4096,
    *,
    settings: TransferSettings,
) -> Iterator[Pair]:
    """Two started engines that know each other."""
    directory = Directory()
    remote = Buffer(num_blocks, block_bytes)
    local = Buffer(num_blocks, block_bytes, fill=0)
    owner = make_engine(directory, "owner", settings=settings)
    reader = make_engine(directory, "reader", settings=settings)
    owner.register(remote.address, remote.bytes.nbytes)
    reader.register(local.address, local.bytes.nbytes)
    with owner, reader:
        yield Pair(directory, owner, reader, remote, local, settings)


def take_ended(engine: TransferEngine, timeout_s: float = 5.0 * SLOWNESS) -> list[EndedHandoff]:
    """Poll until something ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ended := engine.take_ended():
            return ended
        time.sleep(0.002)
    return []


def live_offers(engine: TransferEngine) -> list[Handoff]:
    """Its own hand-offs that are not over, oldest first."""
    return live(engine._table)


def fails(handle: TransferHandle, kind: type[TransferError], match: str = ".*") -> None:
    """The read fails with an error of ``kind`` whose text has ``match``."""
    assert handle.wait(10 * SLOWNESS)
    assert handle.state is TransferState.FAILED
    assert type(handle.error) is kind, handle.error
    assert re.search(match, str(handle.error), re.DOTALL), handle.error


def succeeds(handle: TransferHandle) -> None:
    """The read is done and confirmed."""
    assert handle.wait(20 * SLOWNESS)
    assert (handle.state, handle.error) == (TransferState.DONE, None)


def never_planned(info: PeerInfo) -> ReadPlan:
    """A planner that must not be called."""
    raise AssertionError(f"planned a read from {info}")
