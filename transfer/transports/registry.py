"""Which transports there are, and which of a peer's addresses to use."""

from __future__ import annotations

from collections.abc import Iterable

from transfer.addressing import usable_addresses
from transfer.errors import PeerUnreachable, Phase
from transfer.settings import TransferSettings
from transfer.transports.base import ControlTransport, Transport
from transfer.transports.tcp import TcpTransport


class Transports:
    """The transports of one engine, by scheme."""

    def __init__(self, settings: TransferSettings) -> None:
        self.control: ControlTransport = TcpTransport(settings)
        self._by_scheme: dict[str, Transport] = {self.control.scheme: self.control}

    def __repr__(self) -> str:
        return f"<Transports {', '.join(self._by_scheme)}>"

    def all(self) -> Iterable[Transport]:
        """Every transport that this engine serves on."""
        return self._by_scheme.values()

    def data_routes(self, addresses: Iterable[str]) -> list[tuple[Transport, str]]:
        """Ways to read from a peer, the best one first; none raises as below."""
        usable = usable_addresses(addresses, self._by_scheme.keys())
        routes = [(self._by_scheme[address.partition("://")[0]], address) for address in usable]
        if not routes:
            raise self._no_route(addresses)
        return routes

    def control_address(self, addresses: Iterable[str]) -> str:
        """Where to open the control connection.

        Raises:
            PeerUnreachable: no address can be used by this engine.
        """
        usable = usable_addresses(addresses, [self.control.scheme])
        if not usable:
            raise self._no_route(addresses)
        return usable[0]

    def _no_route(self, addresses: Iterable[str]) -> PeerUnreachable:
        return PeerUnreachable(
            f"none of its addresses {list(addresses)} is of {', '.join(self._by_scheme)}",
            phase=Phase.CONNECT,
        )
