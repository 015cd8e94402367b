"""One prompt's way through prefill and decode, as a pure state machine.

    start ──> prefilling ──> decoding ──> streaming ──> finished
                 │  ▲ ▲          │  ▲         │
                 └──┘ │          └──┘         │
              another │       another decode  ├──> finished with an error event
              replica │       replica, same   │
                      │       ticket          │
                      └───────────────────────┘ prompt and tokens sent, from the start elsewhere

Events go in, instructions come out; :mod:`deployments.router.passage` carries them out. Three
things never happen, whatever the order of events: a ticket is left behind without being told so to
its owner, a request ends without an answer, two prefills of one request run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from deployments.streams.answer import Complete
from transfer.ticket import Ticket


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast to try again.

    Attributes:
        attempts: calls per role, the first included.
        backoff_s: pause before the second call; doubles with each further one.
        backoff_max_s: it never gets longer than this.
        jitter: share of the pause that is random, 0 to 1.
    """

    attempts: int = 3
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0
    jitter: float = 0.5

    def pause_s(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds to wait after the ``failures``-th failure; ``random`` gives 0 to 1."""
        if failures < 1:
            return 0.0
        full = min(self.backoff_max_s, self.backoff_s * 2.0 ** (failures - 1))
        return full * (1.0 - self.jitter * random())


# ---- events ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The request is there. ``bypass``: decode shall compute the prompt itself."""

    bypass: bool = False


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill replica answered; ``ticket`` None: with nothing that could be read."""

    replica_id: str
    ticket: Ticket | None


@dataclass(frozen=True, slots=True)
class PrefillLost:
    """A prefill replica died on us; ``replica_id`` None: no replica took the call.

    ``fallback``: whether decode may compute the prompt when there is no other one to call.
    """

    replica_id: str | None
    fallback: bool = True


@dataclass(frozen=True, slots=True)
class Refused:
    """A replica refused the request as such (bad input); trying elsewhere is of no use."""

    error: Complete


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Engines died under the request; nobody shall be given it again."""

    error: Complete


@dataclass(frozen=True, slots=True)
class FirstChunk:
    """Decode produced output, so a reader of the ticket has read; with one reader, all have."""


@dataclass(frozen=True, slots=True)
class TicketUnread:
    """The decode replica that has the call will not read the ticket and computes by itself."""


@dataclass(frozen=True, slots=True)
class DecodeLost:
    """A decode replica died on us; ``replica_id`` None: no replica took the call.

    ``resumable``: whether what was sent by now can be continued by another one.
    """

    replica_id: str | None
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    """The output is complete."""


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody waits for the answer any more."""


Event = (
    Start
    | Prefilled
    | PrefillLost
    | Refused
    | Unwanted
    | TicketUnread
    | FirstChunk
    | DecodeLost
    | DecodeEnded
    | ClientGone
)

# ---- instructions ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallPrefill:
    """Call a prefill replica, none of ``exclude``, after a pause."""

    exclude: frozenset[str]
    pause_s: float


@dataclass(frozen=True, slots=True)
class CallDecode:
    """Call a decode replica, none of ``exclude``, after a pause; with a ticket if there is one."""

    ticket: Ticket | None
    exclude: frozenset[str]
    pause_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Tell the owner that this hand-off will not be read."""

    replica_id: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the client with an error: ``error`` says why, None: 503.

    ``streaming``: part of the answer has been sent, so it must be an event in the stream.
    """

    error: Complete | None
    streaming: bool = False


Instruction = CallPrefill | CallDecode | GiveUp | Answer


class Stage(Enum):
    """Where the request is."""

    NEW = "new"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    STREAMING = "streaming"
    FINISHED = "finished"


_CALLING = (Stage.PREFILLING, Stage.DECODING, Stage.STREAMING)


@dataclass(slots=True)
class RequestState:
    """The machine. Not thread-safe; one per request.

    Args:
        policy: retry budget.
        random: source of jitter, 0 to 1.
    """

    policy: RetryPolicy
    random: Callable[[], float]
    stage: Stage = Stage.NEW
    _ticket: Ticket | None = None
    _owner: str = ""
    _bypass: bool = False
    _sent: bool = False
    _prefill_failures: int = 0
    _decode_failures: int = 0
    _prefill_excluded: set[str] = field(default_factory=set)
    _decode_excluded: set[str] = field(default_factory=set)

    @property
    def decode_excluded(self) -> frozenset[str]:
        """Decode replicas that would not be called now."""
        return frozenset(self._decode_excluded)

    def on(self, event: Event) -> list[Instruction]:
        """Takes an event and says what to do now. Late events of a finished request do nothing."""
        if self.stage is Stage.FINISHED:
            return self._late(event)
        match event:
            case Start(bypass=bypass) if self.stage is Stage.NEW:
                self._bypass = bypass
                return [self._begin()]
            case Prefilled(replica_id=replica_id, ticket=ticket) if self.stage is Stage.PREFILLING:
                self._owner, self._ticket = replica_id, ticket
                return [self._decode()]
            case PrefillLost(replica_id=replica_id, fallback=fallback) if (
                self.stage is Stage.PREFILLING
            ):
                return self._prefill_lost(replica_id, fallback)
            case DecodeLost(replica_id=replica_id) if self.stage is Stage.DECODING:
                return self._decode_lost(replica_id)
            case DecodeLost(replica_id=replica_id, resumable=resumable) if (
                self.stage is Stage.STREAMING
            ):
                return self._stream_lost(replica_id, resumable)
            case TicketUnread() if self.stage is Stage.DECODING:
                return self._give_up()
            case FirstChunk() if self.stage is Stage.DECODING:
                self.stage, self._sent = Stage.STREAMING, True
                if self._ticket is not None and self._ticket.readers == 1:
                    self._ticket = None
                return []
            case Refused(error=error) if self.stage in (Stage.PREFILLING, Stage.DECODING):
                return [*self._finish(), Answer(error, self._sent)]
            case Unwanted(error=error) if self.stage in _CALLING:
                return [*self._finish(), Answer(error, self._sent)]
            case DecodeEnded() if self.stage is Stage.DECODING:
                # Ended without a single chunk: the client must not be left without an answer.
                return [*self._finish(), Answer(None, self._sent)]
            case DecodeEnded() if self.stage is Stage.STREAMING:
                self._ticket = None
                return self._finish()
            case ClientGone():
                return self._finish()
        raise ValueError(f"{event} cannot happen while {self.stage.value}")

    # ------------------------------------------------------------------------------------------

    def _begin(self) -> CallPrefill | CallDecode:
        return self._decode() if self._bypass else self._prefill()

    def _prefill(self) -> CallPrefill:
        self.stage = Stage.PREFILLING
        pause_s = self.policy.pause_s(self._prefill_failures, self.random)
        return CallPrefill(frozenset(self._prefill_excluded), pause_s)

    def _decode(self) -> CallDecode:
        self.stage = Stage.DECODING
        pause_s = self.policy.pause_s(self._decode_failures, self.random)
        return CallDecode(self._ticket, self.decode_excluded, pause_s)

    def _prefill_lost(self, replica_id: str | None, fallback: bool) -> list[Instruction]:
        self._prefill_failures += 1
        if replica_id is not None:
            self._prefill_excluded.add(replica_id)
            if self._prefill_failures < self.policy.attempts:
                return [self._prefill()]
        return [self._decode()] if fallback else [*self._finish(), Answer(None, self._sent)]

    def _decode_lost(self, replica_id: str | None) -> list[Instruction]:
        self._decode_failures += 1
        if self._decode_failures >= self.policy.attempts:
            return [*self._finish(), Answer(None, self._sent)]
        if replica_id is None:
            # Everybody left was ruled out, or nobody is there: a replacement may be.
            self._decode_excluded.clear()
        else:
            self._decode_excluded.add(replica_id)
        return [self._decode()]

    def _stream_lost(self, replica_id: str | None, resumable: bool) -> list[Instruction]:
        self._decode_failures += 1
        if not resumable or self._decode_failures >= self.policy.attempts:
            return [*self._finish(), Answer(None, streaming=True)]
        if replica_id is not None:
            self._decode_excluded.add(replica_id)
        # A longer prompt than before: the tokens sent are part of it. Its prefill is a new one.
        self._prefill_failures = 0
        return [*self._give_up(), self._begin()]

    def _finish(self) -> list[Instruction]:
        self.stage = Stage.FINISHED
        return self._give_up()

    def _give_up(self) -> list[Instruction]:
        ticket, self._ticket = self._ticket, None
        return [] if ticket is None else [GiveUp(self._owner, ticket)]

    def _late(self, event: Event) -> list[Instruction]:
        if isinstance(event, Prefilled):
            self._owner, self._ticket = event.replica_id, event.ticket
            return self._give_up()
        return []
