"""The life of hand-offs as their owner sees it. Pure state: no I/O, the clock is handed in.

::

    offered ─> reading ─> released
       └──────────┴─────> aborted | expired
"""

from __future__ import annotations

import hmac
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from transfer.errors import HandoffRefused, Phase, RegistrationError
from transfer.spans import check_spans, coverage, empty_spans, lies_within
from transfer.transports.base import Caller
from transfer.types import Credentials, PeerId, SpanArray

REMEMBERED_ENDS = 4096
"""Ended hand-offs that are kept to tell a late reader why, and to answer a repeated release."""


class HandoffState(StrEnum):
    OFFERED = "offered"
    READING = "reading"
    RELEASED = "released"
    ABORTED = "aborted"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What an owner lets others read.

    Attributes:
        handoff_id: uuid, 32 hex digits; never offered twice.
        fence: number never reused within the engine's incarnation.
        token: secret that a reader must show.
        grant: what may be read; any order, rows may touch.
        readers: how many distinct readers must release before the hand-off ends.
        ttl_s: life without a read or a renewal, each of which begins it anew.
        num_blocks: for statistics only.
    """

    handoff_id: str
    fence: int
    token: str
    grant: SpanArray
    readers: int
    ttl_s: float
    num_blocks: int


@dataclass(frozen=True, slots=True)
class EndedHandoff:
    """A hand-off that is over: its blocks may be freed.

    Attributes:
        state: ``RELEASED``, ``ABORTED`` or ``EXPIRED``.
        reason: for people.
        age_s: from the offer to the end.
    """

    handoff_id: str
    fence: int
    state: HandoffState
    reason: str
    num_blocks: int
    age_s: float


@dataclass(frozen=True, slots=True)
class OfferSnapshot:
    """One live hand-off, for statistics.

    Attributes:
        readers_left: releases still missing.
        expires_in_s: seconds until it expires if nobody renews.
    """

    handoff_id: str
    state: HandoffState
    num_blocks: int
    readers_left: int
    age_s: float
    expires_in_s: float


class Permit:
    """Leave to read, given by :meth:`HandoffTable.begin_read`."""

    __slots__ = ("_handoff", "_revoke", "valid")

    def __init__(self, handoff: _Handoff, revoke: Callable[[], None]) -> None:
        self._handoff = handoff
        self._revoke = revoke
        self.valid = True

    def __repr__(self) -> str:
        return f"<Permit {self._handoff.offer.handoff_id} {'valid' if self.valid else 'revoked'}>"


@dataclass(slots=True, eq=False)
class _Handoff:
    offer: Offer
    cover: SpanArray
    offered_at_s: float
    deadline_s: float
    state: HandoffState = HandoffState.OFFERED
    reason: str = ""
    ended_at_s: float = 0.0
    # Reader names: how each was counted off, and which process reads for those that were not.
    released: dict[str, bool] = field(default_factory=dict)
    reading: dict[str, Caller] = field(default_factory=dict)
    permits: set[Permit] = field(default_factory=set)

    @property
    def live(self) -> bool:
        return self.state in (HandoffState.OFFERED, HandoffState.READING)


class HandoffTable:
    """All hand-offs of one owner. Thread-safe.

    Args:
        incarnation: of the owner; credentials for another one are refused.
        clock: seconds, monotonic.
    """

    def __init__(self, incarnation: str, clock: Callable[[], float]) -> None:
        self._incarnation = incarnation
        self._clock = clock
        self._lock = threading.Lock()
        self._live: dict[str, _Handoff] = {}
        self._over: OrderedDict[str, _Handoff] = OrderedDict()
        self._untaken: list[_Handoff] = []

    def __repr__(self) -> str:
        with self._lock:
            return f"<HandoffTable {len(self._live)} live, {len(self._untaken)} ended>"

    def offer(self, offer: Offer) -> None:
        """Begin a hand-off.

        Raises:
            RegistrationError: the grant is malformed.
            HandoffRefused: the id was used before, or a number makes no sense.
        """
        if (
            offer.readers < 1
            or offer.ttl_s <= 0
            or not offer.token
            or not 0 <= offer.fence < 1 << 64
        ):
            raise _refused(
                f"an offer needs a token, a fence, a reader and time to live: {offer.readers} "
                f"readers, ttl_s {offer.ttl_s}, fence {offer.fence}",
                offer.handoff_id,
                Phase.REGISTER,
            )
        cover = coverage(check_spans(offer.grant))
        now = self._clock()
        with self._lock:
            if offer.handoff_id in self._live or offer.handoff_id in self._over:
                raise _refused("offered before", offer.handoff_id, Phase.REGISTER)
            self._live[offer.handoff_id] = _Handoff(offer, cover, now, now + offer.ttl_s)

    def begin_read(
        self,
        caller: Caller,
        credentials: Credentials,
        spans: SpanArray,
        revoke: Callable[[], None],
    ) -> Permit:
        """Admit one read; see :class:`~transfer.transports.base.OwnerService`.

        Raises:
            HandoffRefused: credentials, state or spans do not allow it.
        """
        try:
            check_spans(spans)
        except RegistrationError as error:
            raise _refused(error.message, credentials.handoff_id) from error
        self._expire_if_due(credentials.handoff_id)
        with self._lock:
            handoff = self._admitted(credentials, Phase.READ)
            if credentials.reader in handoff.released:
                raise _refused("this reader has released it", credentials.handoff_id)
            if not lies_within(spans, handoff.cover):
                raise _refused("spans outside of what is offered", credentials.handoff_id)
            permit = Permit(handoff, revoke)
            handoff.permits.add(permit)
            handoff.reading[credentials.reader] = caller
            handoff.state = HandoffState.READING
            self._extend(handoff)
            return permit

    def end_read(self, permit: Permit) -> None:
        """The spans of ``permit`` are not touched any more. Idempotent."""
        with self._lock:
            permit._handoff.permits.discard(permit)

    def release(self, credentials: Credentials, *, used: bool) -> None:
        """Count a reader off; the last one ends the hand-off.

        Returning means that the blocks were pinned from the offer until now. A repeated release
        counts once and is answered like the first, even after the end.

        Args:
            used: False when the reader did not and will not read.

        Raises:
            HandoffRefused: the blocks may have been reused meanwhile.
        """
        self._expire_if_due(credentials.handoff_id)
        with self._lock:
            handoff = self._known(credentials, Phase.CONFIRM)
            before = handoff.released.get(credentials.reader)
            if before is not None:
                if used and not before:
                    raise _refused(
                        "this reader forfeited it", credentials.handoff_id, Phase.CONFIRM
                    )
                return
            if not handoff.live:
                raise self._is_over(handoff, Phase.CONFIRM)
            handoff.released[credentials.reader] = used
            handoff.reading.pop(credentials.reader, None)
            if len(handoff.released) >= handoff.offer.readers:
                # No revoking: every reader said that it has what it wants, and the owner's side
                # of the last read may still be on its way back from the system call.
                self._end(handoff, HandoffState.RELEASED, "released by every reader")

    def renew(self, credentials: Credentials) -> None:
        """Begin the time to live anew.

        Raises:
            HandoffRefused: it is over, or the credentials are wrong.
        """
        self._expire_if_due(credentials.handoff_id)
        with self._lock:
            self._extend(self._admitted(credentials, Phase.READ))

    def abort(self, handoff_id: str, reason: str) -> bool:
        """End a hand-off from the owner's side; whether it was live."""
        with self._lock:
            handoff = self._live.get(handoff_id)
            revoked = self._end(handoff, HandoffState.ABORTED, reason) if handoff else []
        _revoke(revoked)
        return handoff is not None

    def abort_by_reader(self, credentials: Credentials, reason: str) -> None:
        """End a hand-off for all its readers. Repeating it is no error.

        Raises:
            HandoffRefused: unknown, released or expired, or the credentials are wrong.
        """
        with self._lock:
            handoff = self._known(credentials, Phase.READ)
            if handoff.state is HandoffState.ABORTED:
                return
            if not handoff.live:
                raise self._is_over(handoff, Phase.READ)
            revoked = self._end(handoff, HandoffState.ABORTED, reason)
        _revoke(revoked)

    def abort_all(self, reason: str) -> None:
        """End every live hand-off."""
        with self._lock:
            revoked = [
                permit
                for handoff in list(self._live.values())
                for permit in self._end(handoff, HandoffState.ABORTED, reason)
            ]
        _revoke(revoked)

    def reader_left(self, peer: PeerId, alive: str = "") -> None:
        """Abort what a reader that died was reading.

        Args:
            alive: an incarnation of ``peer`` that lives; only others died. Empty when none does.
        """
        revoked: list[Permit] = []
        with self._lock:
            for handoff in list(self._live.values()):
                died = any(
                    caller.peer == peer and not (alive and caller.incarnation == alive)
                    for caller in handoff.reading.values()
                )
                if died:
                    reason = f"reader {peer} died"
                    revoked += self._end(handoff, HandoffState.ABORTED, reason)
        _revoke(revoked)

    def expire(self, handoff_id: str) -> float | None:
        """End a hand-off if its time is over; its deadline if it still lives."""
        self._expire_if_due(handoff_id)
        with self._lock:
            handoff = self._live.get(handoff_id)
            return handoff.deadline_s if handoff else None

    def take_ended(self) -> list[EndedHandoff]:
        """Hand-offs that ended since the last call, each exactly once, oldest first.

        One whose bytes a system call is still sending waits until that is over, so that blocks
        are not reused under it.
        """
        with self._lock:
            taken = [handoff for handoff in self._untaken if not handoff.permits]
            if taken:
                self._untaken = [handoff for handoff in self._untaken if handoff.permits]
            return [
                EndedHandoff(
                    handoff_id=handoff.offer.handoff_id,
                    fence=handoff.offer.fence,
                    state=handoff.state,
                    reason=handoff.reason,
                    num_blocks=handoff.offer.num_blocks,
                    age_s=handoff.ended_at_s - handoff.offered_at_s,
                )
                for handoff in taken
            ]

    def snapshot(self) -> list[OfferSnapshot]:
        """The live hand-offs, oldest first."""
        now = self._clock()
        with self._lock:
            return [
                OfferSnapshot(
                    handoff_id=handoff.offer.handoff_id,
                    state=handoff.state,
                    num_blocks=handoff.offer.num_blocks,
                    readers_left=handoff.offer.readers - len(handoff.released),
                    age_s=now - handoff.offered_at_s,
                    expires_in_s=handoff.deadline_s - now,
                )
                for handoff in self._live.values()
            ]

    def _known(self, credentials: Credentials, phase: Phase) -> _Handoff:
        """The hand-off, live or over, when the credentials fit it. Holds the lock."""
        if credentials.incarnation != self._incarnation:
            raise _refused("offered by another start of the owner", credentials.handoff_id, phase)
        handoff = self._live.get(credentials.handoff_id) or self._over.get(credentials.handoff_id)
        if handoff is None:
            raise _refused("unknown", credentials.handoff_id, phase)
        if not hmac.compare_digest(_secret(credentials.token), _secret(handoff.offer.token)):
            raise _refused("wrong token", credentials.handoff_id, phase)
        if credentials.fence != handoff.offer.fence:
            raise _refused("wrong fence", credentials.handoff_id, phase)
        return handoff

    def _admitted(self, credentials: Credentials, phase: Phase) -> _Handoff:
        handoff = self._known(credentials, phase)
        if not handoff.live:
            raise self._is_over(handoff, phase)
        return handoff

    def _extend(self, handoff: _Handoff) -> None:
        handoff.deadline_s = max(handoff.deadline_s, self._clock() + handoff.offer.ttl_s)

    def _expire_if_due(self, handoff_id: str) -> None:
        """End a hand-off whose deadline passed, though the timer did not come round yet."""
        with self._lock:
            handoff = self._live.get(handoff_id)
            if handoff is None or self._clock() < handoff.deadline_s:
                return
            revoked = self._end(
                handoff, HandoffState.EXPIRED, f"not renewed for {handoff.offer.ttl_s} s"
            )
        _revoke(revoked)

    def _end(self, handoff: _Handoff, state: HandoffState, reason: str) -> list[Permit]:
        """Move a live hand-off to an end state; gives the permits to revoke without the lock."""
        handoff.state = state
        handoff.reason = reason
        handoff.ended_at_s = self._clock()
        for permit in handoff.permits:
            permit.valid = False
        # Thousands of ended hand-offs are remembered: not with their spans.
        handoff.cover = empty_spans()
        handoff.offer = replace(handoff.offer, grant=empty_spans())
        del self._live[handoff.offer.handoff_id]
        self._over[handoff.offer.handoff_id] = handoff
        while len(self._over) > REMEMBERED_ENDS:
            self._over.popitem(last=False)
        self._untaken.append(handoff)
        return list(handoff.permits)

    @staticmethod
    def _is_over(handoff: _Handoff, phase: Phase) -> HandoffRefused:
        return _refused(f"{handoff.state.value}: {handoff.reason}", handoff.offer.handoff_id, phase)


def _revoke(permits: list[Permit]) -> None:
    for permit in permits:
        permit._revoke()


def _secret(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")


def _refused(message: str, handoff_id: str, phase: Phase = Phase.READ) -> HandoffRefused:
    return HandoffRefused(message, phase=phase, handoff_id=handoff_id)
