"""What one decode rank reads: each prompt's blocks, from every owner rank that has a part of them.

A prompt is read as a whole or not at all: if one part fails, so does the prompt, on this rank and,
because vLLM recomputes what any rank reports as failed, on all others.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from transfer.connector.kv.fingerprint import differing
from transfer.connector.kv.heads import HeadRange, Part, parts_of, parts_to_tell
from transfer.connector.kv.layout import KVLayout
from transfer.connector.kv.packing import TOKENS
from transfer.connector.kv.pairing import Stretch, plan_read
from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.metadata import HeldTicket, NewRead
from transfer.connector.outcomes import ReadOutcome
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferHandle, TransferState
from transfer.errors import DigestMismatch, HandoffRefused, LayoutMismatch, OwnerUnproven, Phase
from transfer.ticket import Ticket
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndedRead:
    """A prompt's read that is over on this rank.

    Attributes:
        outcome: ``OK`` when every owner rank confirmed, and the KV cache has the bytes, checked
            if there are digests on both sides.
        bytes_moved: over all parts.
        read_s: seconds that the bytes took, of the slowest part.
        total_s: seconds until the last confirmation, of the slowest part.
    """

    read: NewRead
    outcome: ReadOutcome
    bytes_moved: int = 0
    read_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class _Planner:
    """Pairs the owner's blocks with ours once the owner's layout is known.

    Bytes are asked for after that.
    """

    path: BlockPath
    mark: DeviceEvent
    local: KVLayout
    into: Stretch
    block_ids: Sequence[int]
    owner_rank: int
    heads: HeadRange
    has_digests: bool = False

    def __call__(self, info: PeerInfo) -> ReadPlan:
        self.path.before_read(self.mark)
        remote = KVLayout.decode(info.layout)
        if remote.rank != self.owner_rank:
            raise LayoutMismatch(
                f"rank {self.owner_rank} describes itself as {remote.rank}", phase=Phase.READ
            )
        plan = plan_read(self.local, self.into, remote, self.block_ids, self.heads)
        self.has_digests = bool(remote.digest_base and self.local.digest_base)
        return plan


@dataclass(slots=True)
class _PartRead:
    """One part of a prompt on its way, or an owner rank that only has to be told."""

    part: Part
    planner: _Planner
    handle: TransferHandle | None


@dataclass(slots=True)
class _Load:
    read: NewRead
    blocks: PromptBlocks
    mark: DeviceEvent
    part_reads: list[_PartRead] = field(default_factory=list)
    cancelled: bool = False
    after_read: Future[None] | None = None
    """Of the path; None until all parts are there."""

    @property
    def arrived(self) -> bool:
        """Whether every owner rank confirmed."""
        return all(handle.state is TransferState.DONE for handle in self.handles)

    @property
    def has_digests(self) -> bool:
        """Whether the owner's came along from every part."""
        return all(one.planner.has_digests for one in self.part_reads if one.handle is not None)

    @property
    def handles(self) -> list[TransferHandle]:
        return [one.handle for one in self.part_reads if one.handle is not None]


class PromptReads:
    """Reader side of one worker. All methods run on the model thread; none waits.

    Args:
        peer: this worker.
        layout: of the memory that is read into.
        layout_hash: what tickets must show.
        engine: running.
        deadline_s: for a whole read.
        path: the way from that memory.
    """

    def __init__(
        self,
        peer: PeerId,
        layout: KVLayout,
        layout_hash: str,
        engine: TransferEngine,
        deadline_s: float,
        path: BlockPath,
    ) -> None:
        self._peer = peer
        self._layout = layout
        self._layout_hash = layout_hash
        self._engine = engine
        self._deadline_s = deadline_s
        self._path = path
        self._lock = threading.Lock()
        self._loads: dict[str, _Load] = {}
        self._warned_of_no_digests = False

    def __len__(self) -> int:
        return len(self._loads)

    def start(self, read: NewRead) -> None:
        """Begins a prompt's read from all owner ranks; what is wrong is told by take_ended."""
        tokens = range(read.first_token, read.first_token + read.num_tokens)
        blocks = PromptBlocks(read.local_block_ids, read.places, tokens)
        load = self._loads[read.request_id] = _Load(read, blocks, self._path.mark())
        try:
            parts = self._parts(read.ticket)
        except LayoutMismatch as error:
            logger.warning("ticket of request %s refused: %s", read.request_id, error.message)
            parts = self._parts_to_tell(read.ticket)
        into = blocks.stretch(self._layout.block_size)
        for part in parts:
            planner = _Planner(
                path=self._path,
                mark=load.mark,
                local=self._layout,
                into=into,
                block_ids=read.ticket.block_ids,
                owner_rank=part.owner_rank,
                heads=part.heads,
            )
            handle = None
            if len(part.heads):
                owner, credentials = self._addressee(read.request_id, read.ticket, part)
                handle = self._engine.submit_read(owner, credentials, planner, self._deadline_s)
            load.part_reads.append(_PartRead(part, planner, handle))
        for handle in load.handles:
            handle.when_final(lambda _: self._begin_after_read(load))

    def cancel(self, request_id: str) -> None:
        """Stops a read whose request is gone."""
        load = self._loads.get(request_id)
        if load is not None:
            load.cancelled = True
            _stop(load)

    def forfeit(self, held: HeldTicket) -> None:
        """Tells the owner ranks that this rank answers for that nothing will be read."""
        for part in self._known_parts(held.ticket):
            owner, credentials = self._addressee(held.request_id, held.ticket, part)
            self._engine.submit_release(owner, credentials, used=False)

    def renew(self, held_tickets: Sequence[HeldTicket]) -> None:
        """Tells the same owner ranks that their hand-offs are still wanted."""
        by_owner: dict[PeerId, list[Credentials]] = {}
        for held in held_tickets:
            for part in self._known_parts(held.ticket):
                owner, credentials = self._addressee(held.request_id, held.ticket, part)
                by_owner.setdefault(owner, []).append(credentials)
        for owner, renewed in by_owner.items():
            self._engine.submit_renew(owner, renewed)

    def take_ended(self) -> list[EndedRead]:
        """Reads that ended on this rank since the last call, each exactly once.

        Local memory is not written to any more by those.
        """
        over = []
        for load in self._loads.values():
            states = [handle.state for handle in load.handles]
            if any(state.is_final and state is not TransferState.DONE for state in states):
                _stop(load)
            if not all(state.is_final for state in states):
                continue
            # Perhaps before the thread that made the last one final gets to it.
            self._begin_after_read(load)
            if load.after_read is None or load.after_read.done():
                over.append(load)
        return [self._end(self._loads.pop(load.read.request_id)) for load in over]

    def _begin_after_read(self, load: _Load) -> None:
        """Begins the path's step after the read, once, if all parts are there. Any thread."""
        with self._lock:
            if load.handles and load.arrived and load.after_read is None:
                load.after_read = self._path.after_read(
                    load.blocks, load.mark, check=load.has_digests
                )

    def _end(self, load: _Load) -> EndedRead:
        read, handles = load.read, load.handles
        error = self._error_of(load)
        outcome = _outcome(load, error)
        for one in load.part_reads:
            if one.handle is None or not _owner_is_done(one.handle):
                owner, credentials = self._addressee(read.request_id, read.ticket, one.part)
                self._engine.submit_release(owner, credentials, used=False)
        if outcome is ReadOutcome.CORRUPTED:
            logger.error(
                "blocks of request %s arrived changed from engine %s, recomputing",
                read.request_id,
                read.ticket.engine_id,
            )
        elif error is not None and not load.cancelled:
            logger.warning("read for request %s failed, recomputing: %s", read.request_id, error)
        if outcome is not ReadOutcome.OK:
            return EndedRead(read, outcome)
        timings = [handle.timings for handle in handles]
        return EndedRead(
            read,
            outcome,
            bytes_moved=sum(handle.bytes_moved for handle in handles),
            read_s=max(timing.read_s for timing in timings),
            total_s=max(timing.total_s for timing in timings),
        )

    def _error_of(self, load: _Load) -> BaseException | None:
        """Why a load that is over is of no use, if that came of itself."""
        if load.after_read is None:
            return _cause(load.handles)
        if (error := load.after_read.exception()) is not None:
            return error
        if self._layout.digest_base and not load.has_digests:
            self._warn_once_of_no_digests(load.read.ticket.engine_id)
        try:
            self._path.finish_read(load.blocks, check=load.has_digests)
        except DigestMismatch as mismatch:
            return mismatch
        return None

    def _warn_once_of_no_digests(self, engine_id: str) -> None:
        if not self._warned_of_no_digests:
            logger.warning(
                "engine %s offers blocks without digests; transfer.digests must be set on "
                "both sides. Its blocks are used unchecked",
                engine_id,
            )
        self._warned_of_no_digests = True

    def _parts(self, ticket: Ticket) -> tuple[Part, ...]:
        layout = self._layout
        if ticket.layout_hash != self._layout_hash:
            raise LayoutMismatch(
                f"the two engines differ in: {differing(self._layout_hash, ticket.layout_hash)}",
                phase=Phase.READ,
            )
        if ticket.kv_axes != layout.axes and layout.packing != TOKENS:
            raise LayoutMismatch(
                f"its blocks have axes {ticket.kv_axes}, ours {layout.axes}, and packing "
                f"{layout.packing} cannot be translated",
                phase=Phase.READ,
            )
        return parts_of(layout.rank, layout.tp_size, ticket.tp_size, layout.total_heads)

    def _known_parts(self, ticket: Ticket) -> tuple[Part, ...]:
        """Of a ticket that is not read, and perhaps never looked at closely."""
        try:
            return self._parts(ticket)
        except LayoutMismatch:
            return self._parts_to_tell(ticket)

    def _parts_to_tell(self, ticket: Ticket) -> tuple[Part, ...]:
        return parts_to_tell(self._layout.rank, self._layout.tp_size, ticket.tp_size)

    def _addressee(self, request_id: str, ticket: Ticket, part: Part) -> tuple[PeerId, Credentials]:
        return PeerId(ticket.engine_id, part.owner_rank), Credentials(
            handoff_id=ticket.handoff_id,
            incarnation=ticket.incarnation,
            fence=ticket.fence,
            secret=ticket.secret,
            reader=_reader_name(self._peer, request_id),
            share=part.share,
        )


def _reader_name(peer: PeerId, request_id: str) -> str:
    """What owners tell a request's reads from others' by.

    Servers take the id from whoever sends the request: it may have any length and characters.
    """
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=16)
    return f"{peer}#{digest.hexdigest()}"


def _stop(load: _Load) -> None:
    for handle in load.handles:
        handle.cancel()


def _cause(handles: Sequence[TransferHandle]) -> BaseException | None:
    """The error that came of itself, not of stopping the others."""
    errors = [handle.error for handle in handles if handle.state is TransferState.FAILED]
    return next((error for error in errors if error is not None), None)


def _outcome(load: _Load, error: BaseException | None) -> ReadOutcome:
    if not load.handles:
        return ReadOutcome.REFUSED
    if error is None:
        return ReadOutcome.OK if load.arrived else ReadOutcome.CANCELLED
    if isinstance(error, DigestMismatch):
        return ReadOutcome.CORRUPTED
    if isinstance(error, OwnerUnproven):
        return ReadOutcome.UNPROVEN
    return (
        ReadOutcome.REFUSED
        if isinstance(error, HandoffRefused | LayoutMismatch)
        else ReadOutcome.FAILED
    )


def _owner_is_done(handle: TransferHandle) -> bool:
    """Whether the owner rank has released us, or would not listen to us."""
    return handle.state is TransferState.DONE or isinstance(handle.error, HandoffRefused)
