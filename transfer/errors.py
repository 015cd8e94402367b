"""Every error that ``transfer`` raises. Retryable or fatal is a type, never a string compare."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where in a hand-over something went wrong."""

    DISCOVER = "discover"
    CONNECT = "connect"
    REGISTER = "register"
    READ = "read"
    CONFIRM = "confirm"


class TransferError(Exception):
    """Base of all errors of ``transfer``; carries where it happened and to whom.

    Args:
        message: what is wrong and, if known, what would be right.
        phase: the step that failed.
        peer: ``engine_id/rank`` or an address; empty when no peer is involved.
        handoff_id: the hand-off, empty when none is involved.
    """

    def __init__(self, message: str, *, phase: Phase, peer: str = "", handoff_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.phase = phase
        self.peer = peer
        self.handoff_id = handoff_id

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild,
            (type(self), self.message, self.phase, self.peer, self.handoff_id),
        )

    def __str__(self) -> str:
        where = "".join(
            f", {name} {value}"
            for name, value in (("peer", self.peer), ("hand-off", self.handoff_id))
            if value
        )
        return f"{self.phase.value}: {self.message}{where}"


def _rebuild(
    cls: type[TransferError], message: str, phase: Phase, peer: str, handoff_id: str
) -> TransferError:
    return cls(message, phase=phase, peer=peer, handoff_id=handoff_id)


class RetryableError(TransferError):
    """The same call may succeed later, or on another stream or transport."""


class FatalError(TransferError):
    """The same call can never succeed; do not retry it."""


class PeerUnknown(RetryableError):
    """Discovery has no record of the peer (yet, or any more)."""


class PeerUnreachable(RetryableError):
    """No connection to the peer could be made, or it broke."""


class TransportUnavailable(RetryableError):
    """This way of moving bytes does not work with this peer; another one may."""


class HandoffNotReady(RetryableError):
    """The owner's ticket is quicker than its offer, which will come."""


class DeadlineExceeded(RetryableError):
    """The peer did not answer in time."""


class TransferCancelled(FatalError):
    """Who asked for the transfer cancelled it, or the engine was closed."""


class TlsRefused(FatalError):
    """One end speaks TLS and the other does not, or a certificate is not accepted."""


class HandoffRefused(FatalError):
    """The owner refused the hand-off: unknown, ended, wrong fence, secret or incarnation."""


class OwnerUnproven(FatalError):
    """What answers at the owner's address did not prove that it knows the ticket's secret."""


class DigestMismatch(RetryableError):
    """The bytes that arrived are not those that the owner had."""


class LayoutMismatch(FatalError):
    """Reader and owner disagree about what the bytes mean."""


class ProtocolError(FatalError):
    """The peer sent something that this version does not understand."""


class RegistrationError(FatalError):
    """Memory cannot be registered, or a span lies outside registered memory."""


class ConfigurationError(FatalError):
    """A setting is wrong; the message names it and what would be right."""
