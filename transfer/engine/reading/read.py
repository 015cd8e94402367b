"""One read from an owner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from transfer import faults
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.memory import MemoryTable
from transfer.engine.reading.budget import ByteBudget
from transfer.engine.reading.owner_links import Link, OwnerLinks
from transfer.errors import (
    DeadlineExceeded,
    FatalError,
    HandoffNotReady,
    PeerUnreachable,
    Phase,
    RegistrationError,
    TransportUnavailable,
)
from transfer.spans import check_spans, merge_adjacent, overlaps_itself, total_bytes
from transfer.transports.base import DataChannel
from transfer.types import Credentials, PeerInfo, Planner, ReadPlan

logger = logging.getLogger(__name__)

_TRIES = 2
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1
_NOT_READY_S = 10.0
"""How long an owner may take to offer what its ticket promised: a step of its model. More where it
may take longer to connect."""

# What a planner may raise when it is handed a peer's layout that makes no sense to it.
_PLANNER_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, eq=False)
class ReadOrder:
    """A read as it was asked for.

    Attributes:
        handle: where its submitter sees what becomes of it.
    """

    handle: TransferHandle
    credentials: Credentials
    planner: Planner


class Read:
    """One read, on one thread, from connecting to confirmation.

    Args:
        links: to the owner.
        memory: what may be written to.
        budget: of all reads, for bytes that are on their way.
    """

    def __init__(
        self,
        order: ReadOrder,
        links: OwnerLinks,
        memory: MemoryTable,
        budget: ByteBudget,
    ) -> None:
        self._handle = order.handle
        self._credentials = order.credentials
        self._planner = order.planner
        self._links = links
        self._memory = memory
        self._budget = budget
        self._plan: ReadPlan | None = None
        self._all_read = False
        self._read_id = ""

    def run(self) -> None:
        """Return when the owner confirmed; raise whatever else ends the read."""
        tries_left = _TRIES - 1
        ready_by = min(self._handle.deadline, time.monotonic() + _NOT_READY_S)
        pause_s = _FIRST_PAUSE_S
        while True:
            self._handle.advance(TransferState.CONNECTING)
            faults.reach("reader.connecting", self._handle.owner.engine_id)
            try:
                self._try()
                return
            except HandoffNotReady:
                if time.monotonic() + pause_s >= ready_by or self._handle.wait(pause_s):
                    raise
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            except (PeerUnreachable, DeadlineExceeded) as error:
                # A connection attempt has less time than the whole read.
                if not tries_left or self._handle.interrupt.error is not None or self._late():
                    raise
                tries_left -= 1
                logger.info("will try once more: %s", error)

    def _try(self) -> None:
        handle = self._handle
        self._links.require_layout()
        with self._links.use(self._credentials, handle.deadline) as link:
            self._links.require_layout(link.info)
            plan = self._plan = self._plan or self._checked_plan(link.info)
            if not self._all_read:
                self._read(link, plan)
            handle.advance(TransferState.CONFIRMING)
            faults.reach("reader.confirming", self._handle.owner.engine_id)
            link.control.release(
                self._credentials, used=True, read_id=self._read_id, timeout_s=self._left_s()
            )
            faults.reach("reader.confirmed", self._handle.owner.engine_id)

    def _read(self, link: Link, plan: ReadPlan) -> None:
        while not self._all_read:
            channel = link.routes.channel
            try:
                self._read_from(link, channel, plan)
                self._all_read = True
            except TransportUnavailable as error:
                self._handle.interrupt.check()
                link.routes.lose(channel, error)
                self._handle.advance(TransferState.CONNECTING)

    def _read_from(self, link: Link, channel: DataChannel, plan: ReadPlan) -> None:
        handle = self._handle

        def settle() -> None:
            link.control.settle(self._left_s())

        if not plan.local.size:
            return
        with (
            self._budget.taken(total_bytes(plan.local), handle.interrupt, settle),
            channel.open_read(self._credentials, plan, self._left_s()) as session,
        ):
            self._read_id = session.read_id
            handle.attach(session)
            handle.advance(TransferState.READING)
            faults.reach("reader.reading", handle.owner.engine_id)
            session.run(handle.interrupt)

    def _checked_plan(self, info: PeerInfo) -> ReadPlan:
        try:
            plan = self._planner(info)
        except _PLANNER_ERRORS as error:
            raise FatalError(
                f"the plan failed: {type(error).__name__}: {error}", phase=Phase.READ
            ) from error
        plan = merge_adjacent(
            ReadPlan(local=check_spans(plan.local), remote=check_spans(plan.remote))
        )
        self._memory.check(plan.local, what="the local spans", phase=Phase.READ)
        if overlaps_itself(plan.local):
            raise RegistrationError("local spans overlap", phase=Phase.READ)
        return plan

    def _late(self) -> bool:
        return time.monotonic() >= self._handle.deadline

    def _left_s(self) -> float:
        left_s = self._handle.deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("no time left", phase=Phase.READ)
        return left_s
