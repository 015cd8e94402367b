"""The life of hand-offs as their owner sees it. Pure state: no I/O, the clock is handed in.

::

    offered ─> reading ─> released
       └──────────┴─────> aborted | expired
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from transfer.engine.handoff import EndedHandoff, Handoff, HandoffState, Offer, Permit, Release
from transfer.errors import HandoffNotReady, HandoffRefused, Phase, RegistrationError
from transfer.spans import check_spans, coverage, empty_spans, lies_within
from transfer.types import Claim, PeerId, ReaderProcess, SpanArray

REMEMBERED_ENDS = 4096
"""Ended hand-offs that are kept to tell a late reader why, and to answer a repeated release."""

MAX_ONE_SIDED_READS = 1024
"""One-sided reads that one hand-off admits, those that were broken off and begun anew included."""

MAX_SHARE = 256
"""Ranks of one reader's engine that read from one owner. Their shares are added up exactly, which
takes the more time the more different ones there are."""

MAX_NAMES_PER_READER = 1024
"""Names that read or release one hand-off, for each reader it is offered to: all ranks', and those
of requests that were tried again elsewhere."""


class HandoffTable:
    """All hand-offs of one owner. Thread-safe.

    Offers come in the order of their fences. A claim with a higher one than any so far is of an
    offer that is still on its way here, and raises ``HandoffNotReady``: a ticket goes out from
    the scheduler's process, and may be quicker than the offer to the workers. So do reads of an
    offer that is here, but whose bytes are not.

    Args:
        incarnation: of the owner; claims of another one are refused.
        clock: seconds, monotonic.
        on_end: called when :meth:`take_ended` has something new, with the table's lock held.
    """

    def __init__(
        self, incarnation: str, clock: Callable[[], float], on_end: Callable[[], None]
    ) -> None:
        self._incarnation = incarnation
        self._clock = clock
        self._on_end = on_end
        self._lock = threading.Lock()
        self._live: dict[str, Handoff] = {}
        self._over: OrderedDict[str, Handoff] = OrderedDict()
        self._untaken: list[Handoff] = []
        self._highest_fence = -1

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
            or not offer.secret
            or not 0 <= offer.fence < 1 << 64
        ):
            raise _refused(
                f"an offer needs a secret, a fence, a reader and time to live: {offer.readers} "
                f"readers, ttl_s {offer.ttl_s}, fence {offer.fence}",
                offer.handoff_id,
                Phase.REGISTER,
            )
        cover = coverage(check_spans(offer.grant))
        deadline_s = self._clock() + offer.ttl_s
        with self._lock:
            if offer.handoff_id in self._live or offer.handoff_id in self._over:
                raise _refused("offered before", offer.handoff_id, Phase.REGISTER)
            self._live[offer.handoff_id] = Handoff(offer, cover, deadline_s)
            self._highest_fence = max(self._highest_fence, offer.fence)

    def secret_of(self, claim: Claim) -> str:
        """What a reader must know to claim this; of hand-offs that are over as well.

        Raises:
            HandoffRefused: there is no such hand-off.
        """
        with self._lock:
            return self._known(claim, Phase.CONNECT).offer.secret

    def make_ready(self, handoff_id: str) -> bool:
        """The bytes of a hand-off are there; whether it is live."""
        with self._lock:
            handoff = self._live.get(handoff_id)
            if handoff is not None:
                handoff.offer = replace(handoff.offer, ready=True)
            return handoff is not None

    def begin_read(
        self,
        reader: ReaderProcess,
        claim: Claim,
        spans: SpanArray,
        revoke: Callable[[], None],
    ) -> Permit:
        """Admit one read; see :class:`~transfer.transports.base.OwnerService`.

        Raises:
            HandoffRefused: claim, state or spans do not allow it.
        """
        self._check_before_read(claim, spans)
        with self._lock:
            handoff = self._begun(reader, claim, spans)
            permit = Permit(handoff, revoke)
            handoff.permits.add(permit)
            return permit

    def begin_one_sided_read(
        self, reader: ReaderProcess, claim: Claim, spans: SpanArray, read_id: str
    ) -> None:
        """Admit one read; see :class:`~transfer.transports.base.OwnerService`.

        Raises:
            HandoffRefused: claim, state or spans do not allow it.
        """
        self._check_before_read(claim, spans)
        with self._lock:
            handoff = self._begun(reader, claim, spans)
            reads = handoff.one_sided
            if not read_id or reads.get(read_id, claim.reader) != claim.reader:
                raise _refused("read id empty or another reader's", claim.handoff_id)
            if len(reads) >= MAX_ONE_SIDED_READS and read_id not in reads:
                raise _refused("begun too often", claim.handoff_id)
            reads[read_id] = claim.reader

    def end_read(self, permit: Permit) -> None:
        """The spans of ``permit`` are not touched any more. Idempotent."""
        with self._lock:
            handoff = permit.handoff
            handoff.permits.discard(permit)
            if handoff.offer.handoff_id not in self._live and not handoff.permits:
                self._on_end()

    def release(self, claim: Claim, *, used: bool, read_id: str = "") -> None:
        """Count a reader off; the last one ends the hand-off.

        Returning means that the blocks were pinned from the offer until now or, if the same read
        was confirmed before, until then. A repeated release counts once and is answered like the
        first, even after the end.

        Args:
            used: False when the reader did not and will not read.
            read_id: of the one-sided read that is over. Another read under the same reader's name
                may have gone on after the blocks were free, which nobody could stop.

        Raises:
            HandoffRefused: the blocks may have been reused meanwhile.
        """
        self._expire_if_due(claim.handoff_id)
        with self._lock:
            handoff = self._known(claim, Phase.CONFIRM)
            before = handoff.released.get(claim.reader)
            if before is not None:
                if used and not before.used:
                    raise _refused("this reader forfeited it", claim.handoff_id, Phase.CONFIRM)
                if used and before.read_id != read_id:
                    raise _refused(
                        "another read of this reader released it",
                        claim.handoff_id,
                        Phase.CONFIRM,
                    )
                return
            if not handoff.live:
                raise self._is_over(handoff, Phase.CONFIRM)
            if read_id and handoff.one_sided.get(read_id) != claim.reader:
                raise _refused("that read never began", claim.handoff_id, Phase.CONFIRM)
            self._check_name(handoff, claim, Phase.CONFIRM)
            self._count_off(handoff, claim, used=used, read_id=read_id)

    def renew(self, claim: Claim) -> None:
        """Begin the time to live anew.

        Raises:
            HandoffRefused: it is over, or the claim is wrong.
        """
        self._expire_if_due(claim.handoff_id)
        with self._lock:
            self._extend(self._admitted(claim, Phase.READ))

    def abort(self, handoff_id: str, reason: str) -> bool:
        """End a hand-off from the owner's side; whether it was live."""
        with self._lock:
            handoff = self._live.get(handoff_id)
            revoked = self._end(handoff, HandoffState.ABORTED, reason) if handoff else []
        _revoke(revoked)
        return handoff is not None

    def abort_by_reader(self, claim: Claim, reason: str) -> None:
        """End a hand-off for all its readers. Repeating it is no error.

        Raises:
            HandoffRefused: unknown, released or expired, or the claim is wrong.
        """
        with self._lock:
            handoff = self._known(claim, Phase.READ)
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
                    reader.peer == peer and not (alive and reader.incarnation == alive)
                    for reader in handoff.reading.values()
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
                    state=handoff.state,
                    reason=handoff.reason,
                )
                for handoff in taken
            ]

    def _check_before_read(self, claim: Claim, spans: SpanArray) -> None:
        try:
            check_spans(spans)
        except RegistrationError as error:
            raise _refused(error.message, claim.handoff_id) from error
        self._expire_if_due(claim.handoff_id)

    def _begun(self, reader: ReaderProcess, claim: Claim, spans: SpanArray) -> Handoff:
        """The hand-off, in which a read of ``spans`` is admitted. Holds the lock."""
        handoff = self._admitted(claim, Phase.READ)
        if claim.reader in handoff.released:
            raise _refused("this reader has released it", claim.handoff_id)
        if not lies_within(spans, handoff.cover):
            raise _refused("spans outside of what is offered", claim.handoff_id)
        if not handoff.offer.ready:
            raise HandoffNotReady(
                "its bytes are not there yet", phase=Phase.READ, handoff_id=claim.handoff_id
            )
        self._check_name(handoff, claim, Phase.READ)
        handoff.reading[claim.reader] = reader
        handoff.state = HandoffState.READING
        self._extend(handoff)
        return handoff

    def _count_off(self, handoff: Handoff, claim: Claim, *, used: bool, read_id: str) -> None:
        """A reader is through with a live hand-off. Holds the lock."""
        handoff.count_off(claim.reader, Release(used, read_id, claim.share))
        if handoff.readers_left <= 0:
            # No revoking: every reader said that it has what it wants, and the owner's side
            # of the last read may still be on its way back from the system call.
            self._end(handoff, HandoffState.RELEASED, "released by every reader")

    def _known(self, claim: Claim, phase: Phase) -> Handoff:
        """The hand-off, live or over, when the claim fits it. Holds the lock."""
        if claim.incarnation != self._incarnation:
            raise _refused(
                f"offered by start {claim.incarnation:.64} of the owner, which is now "
                f"{self._incarnation}",
                claim.handoff_id,
                phase,
            )
        handoff = self._live.get(claim.handoff_id) or self._over.get(claim.handoff_id)
        if handoff is None and claim.fence > self._highest_fence:
            raise HandoffNotReady("not offered yet", phase=phase, handoff_id=claim.handoff_id)
        if handoff is None:
            raise _refused("unknown", claim.handoff_id, phase)
        if claim.fence != handoff.offer.fence:
            raise _refused("wrong fence", claim.handoff_id, phase)
        if not 0 < claim.share <= MAX_SHARE:
            raise _refused(
                f"a share of {claim.share} is not from 1 to {MAX_SHARE}",
                claim.handoff_id,
                phase,
            )
        return handoff

    def _admitted(self, claim: Claim, phase: Phase) -> Handoff:
        handoff = self._known(claim, phase)
        if not handoff.live:
            raise self._is_over(handoff, phase)
        return handoff

    @staticmethod
    def _check_name(handoff: Handoff, claim: Claim, phase: Phase) -> None:
        """See that there are not too many readers, if this one is new."""
        if claim.reader in handoff.reading or claim.reader in handoff.released:
            return
        names = len(handoff.reading) + len(handoff.released)
        if names >= handoff.offer.readers * MAX_NAMES_PER_READER:
            raise _refused("too many names of readers", claim.handoff_id, phase)

    def _extend(self, handoff: Handoff) -> None:
        handoff.deadline_s = max(handoff.deadline_s, self._clock() + handoff.offer.ttl_s)

    def _expire_if_due(self, handoff_id: str) -> None:
        """End a hand-off whose deadline passed, though the timer did not come round yet."""
        # The deadline only ever moves on: without the lock too it says that there is time left.
        handoff = self._live.get(handoff_id)
        if handoff is None or self._clock() < handoff.deadline_s:
            return
        with self._lock:
            if not handoff.live or self._clock() < handoff.deadline_s:
                return
            revoked = self._end(
                handoff, HandoffState.EXPIRED, f"not renewed for {handoff.offer.ttl_s} s"
            )
        _revoke(revoked)

    def _end(self, handoff: Handoff, state: HandoffState, reason: str) -> list[Permit]:
        """Move a live hand-off to an end state; gives the permits to revoke without the lock."""
        handoff.state = state
        handoff.reason = reason
        for permit in handoff.permits:
            permit.valid = False
        # Thousands of ended hand-offs are remembered: not with their spans.
        handoff.cover = empty_spans()
        handoff.one_sided.clear()
        handoff.offer = replace(handoff.offer, grant=empty_spans())
        del self._live[handoff.offer.handoff_id]
        self._over[handoff.offer.handoff_id] = handoff
        while len(self._over) > REMEMBERED_ENDS:
            self._over.popitem(last=False)
        self._untaken.append(handoff)
        if not handoff.permits:
            self._on_end()
        return list(handoff.permits)

    @staticmethod
    def _is_over(handoff: Handoff, phase: Phase) -> HandoffRefused:
        return _refused(f"{handoff.state.value}: {handoff.reason}", handoff.offer.handoff_id, phase)


def _revoke(permits: list[Permit]) -> None:
    for permit in permits:
        permit.revoke()


def _refused(message: str, handoff_id: str, phase: Phase = Phase.READ) -> HandoffRefused:
    return HandoffRefused(message, phase=phase, handoff_id=handoff_id)
