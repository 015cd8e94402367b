"""Connections to one owner: made on demand, shared by its reads, dropped when they fail."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from transfer.discovery.base import Discovery
from transfer.engine.reading.routes import DataRoutes
from transfer.errors import (
    DeadlineExceeded,
    HandoffRefused,
    LayoutMismatch,
    OwnerUnproven,
    PeerUnreachable,
    Phase,
    ProtocolError,
    TransferCancelled,
)
from transfer.transports.base import ControlChannel
from transfer.transports.registry import Transports
from transfer.types import Credentials, PeerId, PeerInfo, ReaderProcess

logger = logging.getLogger(__name__)

_DISCOVERY_WAIT_S = 2.0
"""How long an owner that discovery does not know is waited for."""
_BREAKING = (PeerUnreachable, DeadlineExceeded, OwnerUnproven, ProtocolError)


class Link:
    """Control channel and ways to read from one start of an owner."""

    def __init__(self, control: ControlChannel, routes: DataRoutes) -> None:
        self.control = control
        self.routes = routes
        self.users = 0
        self.retired = False

    @property
    def info(self) -> PeerInfo:
        return self.control.info

    def close(self) -> None:
        self.routes.close()
        self.control.close()


class LinkUse:
    """Holds a link within a ``with`` block; if that ends with its breaking, nobody else uses it."""

    __slots__ = ("_link", "_links")

    def __init__(self, links: OwnerLinks, link: Link) -> None:
        self._links = links
        self._link = link

    def __enter__(self) -> Link:
        return self._link

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._links.let_go(self._link, exc)


class OwnerLinks:
    """The link to one owner, and those that still are used although it has another one by now.

    Thread-safe.

    Args:
        own: who connects, as owners hear it.
    """

    def __init__(
        self,
        owner: PeerId,
        own: PeerInfo,
        discovery: Discovery,
        transports: Transports,
    ) -> None:
        self._owner = owner
        self._reader = ReaderProcess(own.peer, own.incarnation)
        self._layout_hash = own.layout_hash
        self._discovery = discovery
        self._transports = transports
        # One at a time connects; the lock is never held while a link is used.
        self._connecting = threading.Lock()
        self._lock = threading.Lock()
        self._current: Link | None = None
        self._in_use: set[Link] = set()
        self._closed = False
        self._announced = ""

    def __repr__(self) -> str:
        with self._lock:
            state = "connected" if self._current else "closed" if self._closed else "idle"
        return f"<OwnerLinks {self._owner} {state}>"

    def use(self, credentials: Credentials, deadline: float) -> LinkUse:
        """A link to the owner's start that ``credentials`` are for; connects if there is none.

        Args:
            credentials: with which to greet the owner, if so.
            deadline: monotonic time.

        Raises:
            PeerUnknown: discovery does not know the owner.
            PeerUnreachable: cannot be connected.
            DeadlineExceeded: not within the deadline.
            OwnerUnproven: what answers does not know the secret.
            HandoffRefused: the owner is another start, or does not know the hand-off.
            HandoffNotReady: it will, soon.
            ProtocolError: what answers does not speak this protocol.
            TlsRefused: only one end speaks TLS, or one does not accept the other's certificate.
            TransportUnavailable: no way to read is left, or the owner has none.
            TransferCancelled: closed meanwhile.
        """
        ready = self._ready(credentials.incarnation)
        return LinkUse(self, ready or self._acquire(credentials, deadline))

    def require_layout(self, info: PeerInfo | None = None) -> None:
        """Checks that the owner's blocks mean what ours do, which only reads need.

        Args:
            info: from the handshake; without it the owner's record counts, if there is one.

        Raises:
            LayoutMismatch: its layout hash differs from ours.
        """
        described = info or self._discovery.lookup(self._owner)
        if described is None:
            return
        if described.layout_hash and described.layout_hash != self._layout_hash:
            raise LayoutMismatch(
                f"its layout hash is {described.layout_hash[:64]}, ours {self._layout_hash}",
                phase=Phase.CONNECT,
                peer=str(self._owner),
            )

    def let_go(self, link: Link, error: BaseException | None) -> None:
        """A user of ``link`` is through with it; one that broke is not used again."""
        if isinstance(error, _BREAKING):
            self._retire(link)
        with self._lock:
            link.users -= 1
            free = link.users == 0
            if free:
                self._in_use.discard(link)
        if free and link.retired:
            link.close()

    def cut(self, alive: str = "") -> None:
        """Fail what uses a link to another start of the owner than ``alive``. Does not block."""
        with self._lock:
            links = {*self._in_use, self._current} if self._current else set(self._in_use)
            cut = [link for link in links if not alive or link.info.incarnation != alive]
        for link in cut:
            link.control.shutdown()
            self._retire(link)

    def close(self) -> None:
        """Cut, and connect no more. Idempotent."""
        with self._lock:
            self._closed = True
        self.cut()

    def _ready(self, incarnation: str) -> Link | None:
        with self._lock:
            link = self._current
            if link is None or link.control.broken or link.info.incarnation != incarnation:
                return None
            self._occupy(link)
            return link

    def _acquire(self, credentials: Credentials, deadline: float) -> Link:
        if not self._connecting.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded(
                "waited for another connection attempt",
                phase=Phase.CONNECT,
                peer=str(self._owner),
            )
        try:
            link = self._ready(credentials.incarnation)
            if link is None:
                self._drop_unusable(credentials.incarnation)
                link = self._connect(credentials, deadline)
            return link
        finally:
            self._connecting.release()

    def _drop_unusable(self, incarnation: str) -> None:
        with self._lock:
            link = self._current
        if link is None:
            return
        record = self._discovery.lookup(self._owner)
        if (
            not link.control.broken
            and record is not None
            and record.incarnation == link.info.incarnation
        ):
            # Discovery agrees with the link: it is the ticket that is of another start.
            raise self._wrong_start(link.info.incarnation, incarnation)
        self._retire(link)

    def _connect(self, credentials: Credentials, deadline: float) -> Link:
        wait_s = min(deadline - time.monotonic(), _DISCOVERY_WAIT_S)
        record = self._discovery.wait_for(self._owner, max(0.0, wait_s))
        control = self._transports.control.open_control(
            self._transports.control_address(record.addresses),
            self._reader,
            credentials,
            deadline - time.monotonic(),
        )
        link = None
        try:
            self._check_info(control.info, credentials.incarnation)
            found = self._transports.data_routes(record.addresses, control.info.addresses)
            routes = DataRoutes(found, self._reader, control, self._announce)
            link = self._adopt(Link(control, routes))
            return link
        finally:
            if link is None:
                control.close()

    def _adopt(self, link: Link) -> Link:
        with self._lock:
            closed = self._closed
            if not closed:
                self._current = link
                self._occupy(link)
        if closed:
            link.routes.close()
            raise TransferCancelled(
                "the engine is closed", phase=Phase.CONNECT, peer=str(self._owner)
            )
        return link

    def _announce(self, route: str) -> None:
        """Say how bytes come from the owner, unless that was the last thing said."""
        with self._lock:
            news = route != self._announced
            self._announced = route
        if news:
            logger.info("reads from %s go over %s", self._owner, route)

    def _check_info(self, info: PeerInfo, incarnation: str) -> None:
        if info.peer != self._owner:
            raise PeerUnreachable(
                f"{info.peer} answers at its address", phase=Phase.CONNECT, peer=str(self._owner)
            )
        if info.incarnation != incarnation:
            raise self._wrong_start(info.incarnation, incarnation)

    def _wrong_start(self, found: str, wanted: str) -> HandoffRefused:
        return HandoffRefused(
            f"offered by start {wanted} of the owner, which is now {found}",
            phase=Phase.CONNECT,
            peer=str(self._owner),
        )

    def _occupy(self, link: Link) -> None:
        link.users += 1
        self._in_use.add(link)

    def _retire(self, link: Link) -> None:
        with self._lock:
            link.retired = True
            if self._current is link:
                self._current = None
            free = link.users == 0
        if free:
            link.close()
