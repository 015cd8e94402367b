"""What the engine knows of a transport.

Control messages (handshake, release, renew, abort) and the reading of data are apart, because
control always goes over a connection while data may go by any means. A transport that only moves
data implements :class:`Transport`; one that can also carry control implements
:class:`ControlTransport`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from transfer.errors import Phase, TransportUnavailable
from transfer.transports.interrupt import Interrupt
from transfer.types import Claim, Credentials, DmaBuf, PeerInfo, ReaderProcess, ReadPlan, SpanArray


class ReadPermit(Protocol):
    """Leave to read some spans, until it is revoked."""

    @property
    def valid(self) -> bool:
        """False once the blocks may be reused; nothing may be sent any more."""
        ...


class OwnerService(Protocol):
    """What a listener asks of the engine it serves. Callable from any thread.

    Every method but ``info`` and ``end_read`` raises ``HandoffNotReady`` when the hand-off is still
    to be offered, and ``HandoffRefused`` when it is not as the claim says. That a claim is made by
    who knows the secret is for the listener to see, before it calls anything but ``secret_of``.
    """

    def info(self) -> PeerInfo: ...

    def secret_of(self, claim: Claim) -> str:
        """The secret of the hand-off that is claimed, be it over or not."""
        ...

    def begin_read(
        self,
        reader: ReaderProcess,
        claim: Claim,
        spans: SpanArray,
        revoke: Callable[[], None],
    ) -> ReadPermit:
        """Check and admit one read of ``spans``.

        Args:
            revoke: called at most once, from any thread, if the hand-off ends otherwise than by
                release while the read goes on; must not block.
        """
        ...

    def end_read(self, permit: ReadPermit) -> None:
        """The spans of ``permit`` are not touched any more."""
        ...

    def begin_one_sided_read(
        self, reader: ReaderProcess, claim: Claim, spans: SpanArray, read_id: str
    ) -> None:
        """Check and admit one read of ``spans`` in which the owner takes no part.

        Blocks are not kept for it beyond the end of the hand-off: that the read was in vain shows
        when it is released.

        Args:
            read_id: made up by the reader, never used for another read; a read may begin in parts.
        """
        ...

    def release(self, claim: Claim, *, used: bool, read_id: str) -> None:
        """Count the reader off; returning means that the blocks were pinned until now.

        Args:
            read_id: of the one-sided read that is over; empty for others.
        """
        ...

    def renew(self, claim: Claim) -> None: ...

    def abort_by_reader(self, claim: Claim, reason: str) -> None: ...


class ReadSession(ABC):
    """One read that has what it needs to begin. Used by one thread, then closed."""

    read_id: str = ""
    """Names a one-sided read to its owner; empty when the owner itself sends the bytes."""

    @property
    @abstractmethod
    def bytes_moved(self) -> int:
        """Bytes written to local memory so far. From any thread."""

    @abstractmethod
    def run(self, interrupt: Interrupt) -> None:
        """Read everything; blocks. Once it returned or raised, local memory is not written to.

        Raises:
            HandoffRefused: the owner does not allow it.
            PeerUnreachable: the connection broke; a fresh one may do.
            TransportUnavailable: another transport may do.
            TransferError: the interrupt's own error, soon after it was set.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the session holds. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DataChannel(ABC):
    """Reads from one address of one owner. Thread-safe."""

    @abstractmethod
    def open_read(self, credentials: Credentials, plan: ReadPlan, timeout_s: float) -> ReadSession:
        """Prepare a read; no byte of local memory is written yet.

        Raises:
            HandoffRefused: the owner does not allow it.
            PeerUnreachable: the owner cannot be reached.
            TransportUnavailable: another transport may do.
            DeadlineExceeded: not within ``timeout_s``.
        """

    @abstractmethod
    def close(self) -> None:
        """Close what is idle now, and what is in use when it is given back. Idempotent."""


class ControlChannel(ABC):
    """Control connection to one owner, after the handshake. Thread-safe; calls take turns.

    Calls raise ``HandoffRefused`` when the owner says so, ``PeerUnreachable`` when the connection
    broke, ``DeadlineExceeded`` when no answer came within ``timeout_s`` and ``OwnerUnproven`` when
    the answer is not that of who knows the secret; after the latter three the channel is of no more
    use.
    """

    info: PeerInfo

    @property
    @abstractmethod
    def broken(self) -> bool:
        """Whether the channel is known to be of no more use."""

    @property
    def hangup_fd(self) -> int:
        """A descriptor on which ``POLLRDHUP`` shows that the connection ended; -1 if none.

        For those who wait for other things meanwhile; open for as long as the channel is.
        """
        return -1

    @abstractmethod
    def settle(self, timeout_s: float) -> None:
        """Say what could wait for the next call. For who will make none for a while: an owner does
        not keep those for long who have not proved anything yet."""

    @abstractmethod
    def exchange(self, scheme: str, request: bytes, timeout_s: float) -> bytes:
        """Set up what transport ``scheme`` needs; see :meth:`Attachment.exchange`."""

    @abstractmethod
    def begin_read(
        self,
        credentials: Credentials,
        spans: SpanArray,
        read_id: str,
        timeout_s: float,
        keys_of: str = "",
    ) -> list[bytes]:
        """Ask leave for a one-sided read; see :meth:`OwnerService.begin_one_sided_read`.

        Args:
            keys_of: scheme of the transport whose :meth:`Attachment.keys` are wanted as well.

        Returns:
            One answer per part in which the spans were sent; none without ``keys_of``.
        """

    @abstractmethod
    def release(
        self, credentials: Credentials, *, used: bool, read_id: str, timeout_s: float
    ) -> None:
        """See :meth:`OwnerService.release`."""

    @abstractmethod
    def renew(self, credentials: Sequence[Credentials], timeout_s: float) -> list[bool]:
        """Renew hand-offs; says for each whether the owner still offers it."""

    @abstractmethod
    def abort(self, credentials: Credentials, reason: str, timeout_s: float) -> None: ...

    @abstractmethod
    def shutdown(self) -> None:
        """Fail calls under way and later ones. Does not block; from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Shut down and free the connection. Idempotent."""


class Attachment(ABC):
    """What a transport of the owner keeps for one reader, as long as its control connection lasts.

    ``exchange`` and ``keys`` raise ``TransportUnavailable`` when another transport may do, and
    ``exchange`` raises ``ProtocolError`` when the reader's request makes no sense.
    """

    @abstractmethod
    def exchange(self, request: bytes | bytearray) -> bytes:
        """Set up what a reader needs before it reads; what is said is the transport's own."""

    @abstractmethod
    def keys(self, spans: SpanArray) -> bytes:
        """What the reader must have to reach ``spans``, which it was admitted to."""

    @abstractmethod
    def close(self) -> None:
        """The reader is gone: it reaches nothing any more. Idempotent.

        Raises:
            OSError: some of it could not be closed; all the rest is.
        """


class Listener(ABC):
    """Serves an owner's memory to its readers on threads of its own."""

    def attach(self, reader: ReaderProcess) -> Attachment:
        """A reader wants to set something up over its control connection.

        Raises:
            TransportUnavailable: this transport has nothing to set up.
        """
        raise TransportUnavailable("nothing to set up", phase=Phase.CONNECT, peer=str(reader.peer))

    @property
    @abstractmethod
    def address(self) -> str:
        """Where peers reach it."""

    @property
    def alive(self) -> bool:
        """Whether it still lets readers in. One without a thread that could end always does."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Cut every connection and join every thread. Idempotent."""


class Transport(ABC):
    """A way to move bytes, named by the scheme of its addresses. Thread-safe."""

    scheme: str
    encrypts: bool
    """Whether nobody on the way can read the bytes."""

    def add_memory(  # noqa: B027  # most need not know
        self, address: int, length: int, dmabuf: DmaBuf | None
    ) -> None:
        """A range of memory was registered with the engine, before or after ``listen``.

        Args:
            dmabuf: for memory of a device; its descriptor is open until :meth:`remove_memory`.

        Raises:
            RegistrationError: it is of a device, and another one does not take it.
        """

    def remove_memory(self, address: int, length: int) -> None:  # noqa: B027
        """It was unregistered; on return nobody reaches it by this transport any more."""

    @abstractmethod
    def listen(self, service: OwnerService) -> Listener:
        """Begin to serve.

        Raises:
            ConfigurationError: the configured address cannot be listened on.
            RegistrationError: as for :meth:`add_memory`, for memory that was registered before.
            TransportUnavailable: this machine does not have what it takes.
        """

    @abstractmethod
    def open_data(
        self, address: str, reader: ReaderProcess, control: ControlChannel
    ) -> DataChannel:
        """A channel for reads. May, but need not, connect already.

        Raises:
            TransportUnavailable: it cannot reach the peer, whatever is tried.
            PeerUnreachable: the peer is gone.
            DeadlineExceeded: it does not answer.
        """


class ControlTransport(Transport):
    """A transport that carries control too."""

    @abstractmethod
    def listen(
        self, service: OwnerService, others: Mapping[str, Listener] | None = None
    ) -> Listener:
        """As :meth:`Transport.listen`.

        Args:
            others: listeners of transports that readers set up over control, by scheme.
        """

    @abstractmethod
    def open_control(
        self, address: str, reader: ReaderProcess, credentials: Credentials, timeout_s: float
    ) -> ControlChannel:
        """Connect and shake hands: each end proves that it knows the secret of one hand-off.

        Args:
            credentials: of the hand-off, alive or over; the channel then serves others as well.

        Raises:
            PeerUnreachable: nobody listens there, or the connection broke.
            DeadlineExceeded: not within ``timeout_s``.
            ProtocolError: what answers does not speak this protocol.
            OwnerUnproven: what answers does not know the secret.
            HandoffRefused: the owner does not know the hand-off.
            HandoffNotReady: it will, soon.
        """
