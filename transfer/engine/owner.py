"""The owner's side of an engine, as its listeners use it."""

from __future__ import annotations

from collections.abc import Callable

from transfer.engine.handoffs import HandoffTable, Permit
from transfer.engine.memory import MemoryTable
from transfer.errors import HandoffRefused, Phase, RegistrationError
from transfer.transports.base import Caller, ReadPermit
from transfer.types import Credentials, PeerInfo, SpanArray


class Owner:
    """Implements :class:`~transfer.transports.base.OwnerService`. Thread-safe."""

    def __init__(self, info: PeerInfo, table: HandoffTable, memory: MemoryTable) -> None:
        self._info = info
        self._table = table
        self._memory = memory

    def info(self) -> PeerInfo:
        return self._info

    def begin_read(
        self,
        caller: Caller,
        credentials: Credentials,
        spans: SpanArray,
        revoke: Callable[[], None],
    ) -> Permit:
        permit = self._table.begin_read(caller, credentials, spans, revoke)
        try:
            self._memory.check(spans, what="the offered spans", phase=Phase.READ)
        except RegistrationError as error:
            self._table.end_read(permit)
            raise HandoffRefused(
                error.message, phase=Phase.READ, handoff_id=credentials.handoff_id
            ) from error
        return permit

    def end_read(self, permit: ReadPermit) -> None:
        if isinstance(permit, Permit):
            self._table.end_read(permit)

    def release(self, credentials: Credentials, *, used: bool) -> None:
        self._table.release(credentials, used=used)

    def renew(self, credentials: Credentials) -> None:
        self._table.renew(credentials)

    def abort_by_reader(self, credentials: Credentials, reason: str) -> None:
        self._table.abort_by_reader(credentials, reason)
