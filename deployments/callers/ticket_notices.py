"""Tells owners of tickets that nobody will read them, from a process that has no engine."""

from __future__ import annotations

import uuid

from transfer.discovery.base import Discovery
from transfer.errors import PeerUnknown, Phase
from transfer.settings import TransferSettings
from transfer.ticket import Ticket
from transfer.transports.registry import Transports
from transfer.types import Credentials, PeerId, ReaderProcess


class TicketNotices:
    """Ends hand-offs at their owners' control ports.

    Args:
        discovery: knows the owners; not closed here.
        settings: of the connections.

    Raises:
        ConfigurationError: the files for TLS cannot be used.
    """

    def __init__(self, discovery: Discovery, settings: TransferSettings) -> None:
        self._discovery = discovery
        self._settings = settings
        self._control = Transports(settings)
        self._name = ReaderProcess(PeerId(f"proxy-{uuid.uuid4().hex}", 0), uuid.uuid4().hex)

    def abort(self, ticket: Ticket) -> None:
        """Ends one hand-off on all ranks of its owner. Blocks; from any thread.

        Raises:
            PeerUnknown: the owner is not there any more, and its blocks with it.
            TransferError: it could not be told.
        """
        credentials = Credentials(
            handoff_id=ticket.handoff_id,
            incarnation=ticket.incarnation,
            fence=ticket.fence,
            secret=ticket.secret,
            reader=f"{self._name.peer}",
        )
        for rank in range(ticket.tp_size):
            owner = PeerId(ticket.engine_id, rank)
            record = self._discovery.lookup(owner)
            if record is None:
                raise PeerUnknown("it left", phase=Phase.DISCOVER, peer=str(owner))
            timeout_s = self._settings.connect_timeout_s
            channel = self._control.control.open_control(
                self._control.control_address(record.addresses), self._name, credentials, timeout_s
            )
            try:
                channel.abort(credentials, "the proxy gave it up", timeout_s)
            finally:
                channel.close()
