"""The owner's side of an engine, as its listeners use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transfer.engine.handoff import Permit
from transfer.engine.memory import MemoryTable
from transfer.engine.owning.handoffs import HandoffTable
from transfer.errors import HandoffRefused, Phase, RegistrationError, TransportUnavailable
from transfer.transports.base import ReadPermit
from transfer.types import Claim, PeerInfo, ReaderProcess, SpanArray


class Owner:
    """Implements :class:`~transfer.transports.base.OwnerService`. Thread-safe."""

    def __init__(self, info: PeerInfo, table: HandoffTable, memory: MemoryTable) -> None:
        self._info = info
        self._table = table
        self._memory = memory

    def info(self) -> PeerInfo:
        return self._info

    def advertise(self, addresses: tuple[str, ...]) -> None:
        """Tell readers from now on that memory can also be read at ``addresses``."""
        self._info = replace(self._info, addresses=addresses)

    def secret_of(self, claim: Claim) -> str:
        return self._table.secret_of(claim)

    def begin_read(
        self,
        reader: ReaderProcess,
        claim: Claim,
        spans: SpanArray,
        revoke: Callable[[], None],
    ) -> Permit:
        permit = self._table.begin_read(reader, claim, spans, revoke)
        try:
            self._check_sendable(claim, spans)
        except (HandoffRefused, TransportUnavailable):
            self._table.end_read(permit)
            raise
        return permit

    def end_read(self, permit: ReadPermit) -> None:
        """See :class:`~transfer.transports.base.OwnerService`.

        Raises:
            TypeError: :meth:`begin_read` did not give that permit.
        """
        if not isinstance(permit, Permit):
            raise TypeError(f"{permit!r} is not a permit that this owner gave")
        self._table.end_read(permit)

    def begin_one_sided_read(
        self, reader: ReaderProcess, claim: Claim, spans: SpanArray, read_id: str
    ) -> None:
        self._table.begin_one_sided_read(reader, claim, spans, read_id)
        self._check_registered(claim, spans)

    def release(self, claim: Claim, *, used: bool, read_id: str) -> None:
        self._table.release(claim, used=used, read_id=read_id)

    def renew(self, claim: Claim) -> None:
        self._table.renew(claim)

    def abort_by_reader(self, claim: Claim, reason: str) -> None:
        self._table.abort_by_reader(claim, reason)

    def _check_sendable(self, claim: Claim, spans: SpanArray) -> None:
        """See that a processor of this host can read them."""
        self._check_registered(claim, spans)
        if self._memory.touches_devices(spans):
            raise TransportUnavailable(
                "what is offered is in the memory of a device, which only rdma reads",
                phase=Phase.READ,
                handoff_id=claim.handoff_id,
            )

    def _check_registered(self, claim: Claim, spans: SpanArray) -> None:
        try:
            self._memory.check(spans, what="the offered spans", phase=Phase.READ)
        except RegistrationError as error:
            raise HandoffRefused(
                error.message, phase=Phase.READ, handoff_id=claim.handoff_id
            ) from error
