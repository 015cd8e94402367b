"""Which transports there are, and which of a peer's addresses to use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from transfer.addressing import usable_addresses
from transfer.errors import ConfigurationError, PeerUnreachable, Phase, TransportUnavailable
from transfer.settings import AUTO, TransferSettings
from transfer.transports.base import ControlTransport, Listener, OwnerService, Transport
from transfer.transports.rdma.transport import RdmaTransport
from transfer.transports.shm.transport import ShmTransport
from transfer.transports.tcp.transport import TcpTransport
from transfer.types import DmaBuf

logger = logging.getLogger(__name__)

_DATA_ONLY: dict[str, Callable[[TransferSettings], Transport]] = {
    ShmTransport.scheme: ShmTransport,
    RdmaTransport.scheme: RdmaTransport,
}
"""Transports that need another one for control, by scheme."""


class Transports:
    """The transports of one engine, by scheme.

    Raises:
        ConfigurationError: the files for TLS cannot be used.
    """

    def __init__(self, settings: TransferSettings) -> None:
        self.control: ControlTransport = TcpTransport(settings)
        self._forced = settings.transports != AUTO
        allowed = settings.transports if self._forced else (*_DATA_ONLY, self.control.scheme)
        self._by_scheme: dict[str, Transport] = {}
        for scheme in allowed:
            own = scheme == self.control.scheme
            transport = self.control if own else _DATA_ONLY[scheme](settings)
            if self._forced or not settings.tls_ca or transport.encrypts:
                self._by_scheme[scheme] = transport
            else:
                # Who asks for TLS does not expect bytes to go in the clear beside it.
                logger.info("%s is not used: it does not encrypt, and TLS is asked for", scheme)

    def __repr__(self) -> str:
        return f"<Transports {', '.join(self._by_scheme)}>"

    def listen(
        self, service: OwnerService, advertise: Callable[[tuple[str, ...]], None]
    ) -> list[Listener]:
        """Serve on every transport, the one for control first.

        Args:
            advertise: told the addresses of all but that one before it accepts anybody.

        Raises:
            ConfigurationError: an address cannot be listened on, or the settings name a transport
                that does not work here.
        """
        listeners: list[Listener] = []
        by_scheme: dict[str, Listener] = {}
        listening = False
        try:
            for transport in self._by_scheme.values():
                if transport is not self.control:
                    for listener in self._listen_if_possible(transport, service):
                        listeners.append(listener)
                        by_scheme[transport.scheme] = listener
            advertise(tuple(listener.address for listener in listeners))
            listeners.insert(0, self.control.listen(service, by_scheme))
            listening = True
            return listeners
        finally:
            if not listening:
                with ExitStack() as closing:  # each whether or not another one fails
                    for listener in listeners:
                        closing.callback(listener.close)

    def add_memory(self, address: int, length: int, dmabuf: DmaBuf | None) -> None:
        """Tell every transport of memory that was registered."""
        for transport in self._by_scheme.values():
            transport.add_memory(address, length, dmabuf)

    def remove_memory(self, address: int, length: int) -> None:
        """Tell every transport of memory that was unregistered."""
        for transport in self._by_scheme.values():
            transport.remove_memory(address, length)

    def data_routes(
        self, published: Iterable[str], told: Iterable[str]
    ) -> list[tuple[Transport, str]]:
        """Ways to read from a peer, the best one first.

        Args:
            published: addresses of its record.
            told: addresses that the peer itself named in the handshake.

        Raises:
            PeerUnreachable: no address can be used by this engine.
        """
        control = usable_addresses(published, [self.control.scheme])
        usable = usable_addresses([*told, *control], self._by_scheme.keys())
        if not usable:
            raise self._no_route([*published, *told])
        return [(self._by_scheme[address.partition("://")[0]], address) for address in usable]

    def control_address(self, addresses: Iterable[str]) -> str:
        """Where to open the control connection.

        Raises:
            PeerUnreachable: no address can be used by this engine.
        """
        usable = usable_addresses(addresses, [self.control.scheme])
        if not usable:
            raise self._no_route(addresses)
        return usable[0]

    def _listen_if_possible(self, transport: Transport, service: OwnerService) -> list[Listener]:
        try:
            return [transport.listen(service)]
        except TransportUnavailable as error:
            if self._forced:
                raise ConfigurationError(
                    f"transports names {transport.scheme}: {error.message}", phase=Phase.REGISTER
                ) from error
            logger.info("cannot be read over %s: %s", transport.scheme, error.message)
            return []

    def _no_route(self, addresses: Iterable[str]) -> PeerUnreachable:
        return PeerUnreachable(
            f"none of its addresses {list(addresses)} is of {', '.join(self._by_scheme)}",
            phase=Phase.CONNECT,
        )
