from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.router.request_state import (
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    DecodeEnded,
    DecodeLost,
    Event,
    FirstChunk,
    GiveUp,
    Instruction,
    Prefilled,
    PrefillLost,
    Refused,
    RequestState,
    RetryPolicy,
    Stage,
    Start,
    TicketUnread,
    Unwanted,
)
from deployments.streams.answer import Refusal
from tests.support.scripted.tickets import make_ticket
from transfer.ticket import Ticket

POLICY = RetryPolicy(attempts=3, backoff_s=0.1, backoff_max_s=0.3, jitter=0.0)
T1, T2 = make_ticket("1"), make_ticket("2")
TWO_READERS = make_ticket("3", readers=2)
PREFILLED = Prefilled("p1", TWO_READERS)
BAD, TOO_LONG = Refusal("bad", code=400), Refusal("too long", code=400)
KILLER = Refusal("killer", code=500)
GIVE_UP = GiveUp("p1", TWO_READERS)


def prefill(*exclude: str, pause_s: float = 0.0) -> CallPrefill:
    return CallPrefill(frozenset(exclude), pause_s)


def decode(*exclude: str, ticket: Ticket | None = None, pause_s: float = 0.0) -> CallDecode:
    return CallDecode(ticket, frozenset(exclude), pause_s)


Step = tuple[Event, list[Instruction]]
TO_DECODE: list[Step] = [(Start(), [prefill()]), (PREFILLED, [decode(ticket=TWO_READERS)])]
TO_STREAM: list[Step] = [*TO_DECODE, (FirstChunk(), [])]

PATHS: dict[str, list[Step]] = {
    "all is well": [*TO_STREAM, (DecodeEnded(), [])],
    "bypass": [(Start(bypass=True), [decode()]), (FirstChunk(), []), (DecodeEnded(), [])],
    "prefill leaves no ticket": [
        (Start(), [prefill()]),
        (Prefilled("p1", None), [decode()]),
        (ClientGone(), []),
    ],
    "prefill lost once": [
        (Start(), [prefill()]),
        (PrefillLost("p0"), [prefill("p0", pause_s=0.1)]),
        (PREFILLED, [decode(ticket=TWO_READERS)]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "prefill lost until the budget is spent": [
        (Start(), [prefill()]),
        (PrefillLost("p0"), [prefill("p0", pause_s=0.1)]),
        (PrefillLost("p1"), [prefill("p0", "p1", pause_s=0.2)]),
        (PrefillLost("p2"), [decode()]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "a suspect whose prefill replica was the only one": [
        (Start(), [prefill()]),
        (PrefillLost("p0", fallback=False), [prefill("p0", pause_s=0.1)]),
        (PrefillLost(None, fallback=False), [Answer(None)]),
    ],
    "a suspect with no attempt left": [
        (Start(), [prefill()]),
        (PrefillLost("p0", fallback=False), [prefill("p0", pause_s=0.1)]),
        (PrefillLost("p1", fallback=False), [prefill("p0", "p1", pause_s=0.2)]),
        (PrefillLost("p2", fallback=False), [Answer(None)]),
    ],
    "unwanted after prefill died": [
        (Start(), [prefill()]),
        (Unwanted(KILLER), [Answer(KILLER)]),
        (ClientGone(), []),
    ],
    "unwanted after decode died": [
        *TO_DECODE,
        (Unwanted(KILLER), [GIVE_UP, Answer(KILLER)]),
    ],
    "unwanted in mid-stream": [
        *TO_STREAM,
        (Unwanted(KILLER), [GIVE_UP, Answer(KILLER, streaming=True)]),
    ],
    "no prefill replica": [(Start(), [prefill()]), (PrefillLost(None), [decode()])],
    "the last prefill replica lost": [
        (Start(), [prefill()]),
        (PrefillLost("p0"), [prefill("p0", pause_s=0.1)]),
        (PrefillLost(None), [decode()]),
    ],
    "refused by prefill": [(Start(), [prefill()]), (Refused(BAD), [Answer(BAD)])],
    "refused by decode": [*TO_DECODE, (Refused(BAD), [GIVE_UP, Answer(BAD)])],
    "refused by decode, nothing to give up": [
        (Start(bypass=True), [decode()]),
        (Refused(BAD), [Answer(BAD)]),
    ],
    "decode lost before the first chunk": [
        *TO_DECODE,
        (DecodeLost("d0"), [decode("d0", ticket=TWO_READERS, pause_s=0.1)]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "decode lost until the budget is spent": [
        *TO_DECODE,
        (DecodeLost("d0"), [decode("d0", ticket=TWO_READERS, pause_s=0.1)]),
        (DecodeLost("d1"), [decode("d0", "d1", ticket=TWO_READERS, pause_s=0.2)]),
        (DecodeLost("d2"), [GIVE_UP, Answer(None)]),
    ],
    "all decode replicas ruled out: a replacement may be one of them": [
        *TO_DECODE,
        (DecodeLost("d0"), [decode("d0", ticket=TWO_READERS, pause_s=0.1)]),
        (DecodeLost(None), [decode(ticket=TWO_READERS, pause_s=0.2)]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "never a decode replica": [
        *TO_DECODE,
        (DecodeLost(None), [decode(ticket=TWO_READERS, pause_s=0.1)]),
        (DecodeLost(None), [decode(ticket=TWO_READERS, pause_s=0.2)]),
        (DecodeLost(None), [GIVE_UP, Answer(None)]),
    ],
    "decode lost in mid-stream, two samples": [
        *TO_STREAM,
        (DecodeLost("d0"), [GIVE_UP, Answer(None, streaming=True)]),
    ],
    "decode lost in mid-stream, one sample": [
        (Start(), [prefill()]),
        (Prefilled("p1", T1), [decode(ticket=T1)]),
        (FirstChunk(), []),
        (DecodeLost("d0"), [Answer(None, streaming=True)]),
    ],
    "stream goes on elsewhere": [
        (Start(), [prefill()]),
        (Prefilled("p1", T1), [decode(ticket=T1)]),
        (FirstChunk(), []),
        (DecodeLost("d0", resumable=True), [prefill()]),
        (Prefilled("p2", T2), [decode("d0", ticket=T2, pause_s=0.1)]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "stream goes on although prefill is away": [
        *TO_STREAM,
        (DecodeLost("d0", resumable=True), [GIVE_UP, prefill()]),
        (PrefillLost(None), [decode("d0", pause_s=0.1)]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "prefill's budget of a stream that goes on is its own": [
        (Start(), [prefill()]),
        (PrefillLost("p0"), [prefill("p0", pause_s=0.1)]),
        (PrefillLost("p1"), [prefill("p0", "p1", pause_s=0.2)]),
        (Prefilled("p2", T1), [decode(ticket=T1)]),
        (FirstChunk(), []),
        (DecodeLost("d0", resumable=True), [prefill("p0", "p1")]),
        (PrefillLost("p2"), [prefill("p0", "p1", "p2", pause_s=0.1)]),
        (ClientGone(), []),
    ],
    "stream without prefill goes on without": [
        (Start(bypass=True), [decode()]),
        (FirstChunk(), []),
        (DecodeLost("d0", resumable=True), [decode("d0", pause_s=0.1)]),
        (ClientGone(), []),
    ],
    "stream goes on until the budget is spent": [
        (Start(bypass=True), [decode()]),
        (FirstChunk(), []),
        (DecodeLost("d0", resumable=True), [decode("d0", pause_s=0.1)]),
        (FirstChunk(), []),
        (DecodeLost("d1", resumable=True), [decode("d0", "d1", pause_s=0.2)]),
        (FirstChunk(), []),
        (DecodeLost("d2", resumable=True), [Answer(None, streaming=True)]),
    ],
    "stream that nobody goes on with": [
        (Start(bypass=True), [decode()]),
        (FirstChunk(), []),
        (DecodeLost("d0", resumable=True), [decode("d0", pause_s=0.1)]),
        (DecodeLost("d1", resumable=True), [decode("d0", "d1", pause_s=0.2)]),
        (DecodeLost(None, resumable=True), [Answer(None, streaming=True)]),
    ],
    "stream whose continuation is refused": [
        *TO_STREAM,
        (DecodeLost("d0", resumable=True), [GIVE_UP, prefill()]),
        (Refused(TOO_LONG), [Answer(TOO_LONG, streaming=True)]),
    ],
    "client leaves a stream that was to go on": [
        *TO_STREAM,
        (DecodeLost("d0", resumable=True), [GIVE_UP, prefill()]),
        (ClientGone(), []),
        (Prefilled("p2", T1), [GiveUp("p2", T1)]),
    ],
    "decode leaves the ticket unread": [
        *TO_DECODE,
        (TicketUnread(), [GIVE_UP]),
        (FirstChunk(), []),
        (DecodeEnded(), []),
    ],
    "decode leaves the ticket unread and is lost": [
        *TO_DECODE,
        (TicketUnread(), [GIVE_UP]),
        (DecodeLost("d0"), [decode("d0", pause_s=0.1)]),
        (ClientGone(), []),
    ],
    "decode ends without a word": [*TO_DECODE, (DecodeEnded(), [GIVE_UP, Answer(None)])],
    "client gone at once": [(ClientGone(), [])],
    "client gone during prefill": [(Start(), [prefill()]), (ClientGone(), [])],
    "client gone, then prefill is through": [
        (Start(), [prefill()]),
        (ClientGone(), []),
        (PREFILLED, [GIVE_UP]),
        (PrefillLost("p2"), []),
    ],
    "client gone before the first chunk": [*TO_DECODE, (ClientGone(), [GIVE_UP])],
    "client gone between two decode replicas": [
        *TO_DECODE,
        (DecodeLost("d0"), [decode("d0", ticket=TWO_READERS, pause_s=0.1)]),
        (ClientGone(), [GIVE_UP]),
        (ClientGone(), []),
    ],
    "client gone in mid-stream: decode has the blocks": [
        (Start(), [prefill()]),
        (Prefilled("p1", T1), [decode(ticket=T1)]),
        (FirstChunk(), []),
        (ClientGone(), []),
    ],
    "client gone in mid-stream: one of two samples may be unread": [
        *TO_STREAM,
        (ClientGone(), [GIVE_UP]),
    ],
}


@pytest.mark.parametrize("steps", PATHS.values(), ids=PATHS.keys())
def test_path(steps: list[Step]) -> None:
    state = RequestState(POLICY, lambda: 0.0)

    for number, (event, instructions) in enumerate(steps):
        assert state.on(event) == instructions, f"step {number}: {event}"


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], PREFILLED),
        ([], FirstChunk()),
        ([], DecodeEnded()),
        ([Start()], Start()),
        ([Start()], FirstChunk()),
        ([Start()], DecodeLost("d0")),
        ([Start()], DecodeEnded()),
        ([Start(), PREFILLED], PREFILLED),
        ([Start(), PREFILLED], PrefillLost("p1")),
        ([Start(), PREFILLED, FirstChunk()], FirstChunk()),
        ([Start(), PREFILLED, FirstChunk()], Refused(BAD)),
    ],
)
def test_events_that_cannot_happen_are_faults_of_the_caller(
    before: list[Event], event: Event
) -> None:
    state = RequestState(POLICY, lambda: 0.0)
    for earlier in before:
        state.on(earlier)

    with pytest.raises(ValueError, match="cannot happen"):
        state.on(event)


# ---- pauses --------------------------------------------------------------------------------------


def test_pauses_double_up_to_their_limit() -> None:
    policy = RetryPolicy(backoff_s=0.05, backoff_max_s=0.3, jitter=0.5)

    assert [policy.pause_s(failures, lambda: 0.0) for failures in range(6)] == pytest.approx(
        [0.0, 0.05, 0.1, 0.2, 0.3, 0.3]
    )
    assert policy.pause_s(2, lambda: 1.0) == pytest.approx(0.05)


@given(
    st.integers(0, 1000),
    st.floats(0, 10),
    st.floats(0, 100),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_pause_is_never_negative_nor_above_its_limit(
    failures: int, backoff_s: float, backoff_max_s: float, jitter: float, chance: float
) -> None:
    policy = RetryPolicy(backoff_s=backoff_s, backoff_max_s=backoff_max_s, jitter=jitter)

    assert 0.0 <= policy.pause_s(failures, lambda: chance) <= backoff_max_s


# ---- any order of events -------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Plays the world around the machine: calls that it asked for end in any way, at any time.

    Events of calls that are over come again, late. ``offered``, ``consumed`` and ``given_up`` keep
    account of every ticket, ``rounds`` of the prefills before each break of the stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 3
        policy = RetryPolicy(self.attempts, backoff_s=0.1, backoff_max_s=0.15, jitter=0.5)
        self.state = RequestState(policy, lambda: 0.5)
        self.running: CallPrefill | CallDecode | None = None
        self.calls: list[CallPrefill | CallDecode] = []
        self.rounds: list[list[CallPrefill]] = [[]]
        self.lost: set[str] = set()
        self.offered: dict[str, str] = {}
        self.consumed: set[str] = set()
        self.given_up: list[tuple[str, str]] = []
        self.answers: list[Answer] = []
        self.bypass = False
        self.client_here = True
        self.sent = False
        self.streaming = False

    def tell(self, event: Event, *, ends_call: bool = True) -> None:
        if ends_call:
            self.running, self.streaming = None, False
        for instruction in self.state.on(event):
            match instruction:
                case GiveUp(replica_id=replica_id, ticket=ticket):
                    self.given_up.append((replica_id, ticket.handoff_id))
                case Answer():
                    self.answers.append(instruction)
                case CallPrefill() | CallDecode():
                    assert self.running is None, "two calls at once"
                    assert self.client_here, "a call for nobody"
                    self.running = instruction
                    self.calls.append(instruction)
                    if isinstance(instruction, CallPrefill):
                        self.rounds[-1].append(instruction)

    def held(self) -> set[str]:
        """The hand-off that the running call has the ticket of."""
        ticket = self.running.ticket if isinstance(self.running, CallDecode) else None
        return set() if ticket is None else {ticket.handoff_id}

    def finished(self) -> bool:
        return self.state.stage is Stage.FINISHED

    def prefilling(self) -> bool:
        return isinstance(self.running, CallPrefill)

    def decoding(self) -> bool:
        return isinstance(self.running, CallDecode)

    # -- events --

    @precondition(lambda self: self.state.stage is Stage.NEW)
    @rule(bypass=st.booleans())
    def start(self, bypass: bool) -> None:
        self.bypass = bypass
        self.tell(Start(bypass))
        assert self.decoding() if bypass else self.prefilling()

    @precondition(prefilling)
    @rule(replica=st.sampled_from("abcde"), readers=st.integers(0, 3))
    def prefill_answers(self, replica: str, readers: int) -> None:
        ticket = None
        if readers:
            ticket = make_ticket(handoff_id=f"{replica}-{len(self.offered)}", readers=readers)
            self.offered[ticket.handoff_id] = replica
        self.tell(Prefilled(replica, ticket))
        if self.client_here:
            assert isinstance(self.running, CallDecode)
            assert self.running.ticket == ticket

    @precondition(prefilling)
    @rule(replica=st.sampled_from("abcde"))
    def prefill_dies(self, replica: str) -> None:
        assert self.running is not None
        if replica in self.running.exclude:
            return
        self.lost.add(replica)
        self.tell(PrefillLost(replica))

    @precondition(prefilling)
    @rule(fallback=st.booleans())
    def no_prefill(self, fallback: bool) -> None:
        self.tell(PrefillLost(None, fallback))
        assert self.decoding() or not self.client_here or not fallback

    @precondition(lambda self: self.running is not None)
    @rule()
    def is_unwanted(self) -> None:
        self.tell(Unwanted(KILLER))
        assert self.running is None

    @precondition(lambda self: self.running is not None and not self.streaming)
    @rule()
    def refused(self) -> None:
        self.tell(Refused(BAD))

    @precondition(lambda self: self.decoding() and not self.streaming)
    @rule()
    def ticket_unread(self) -> None:
        before = self.running
        assert isinstance(before, CallDecode)
        self.tell(TicketUnread(), ends_call=False)
        self.running = replace(before, ticket=None)

    @precondition(lambda self: self.decoding() and not self.streaming)
    @rule()
    def first_chunk(self) -> None:
        assert isinstance(self.running, CallDecode)
        if self.client_here:
            # One reader in all: it has read. Several: nobody knows which one spoke first.
            ticket = self.running.ticket
            if ticket is not None and ticket.readers == 1:
                self.consumed.add(ticket.handoff_id)
            self.streaming = self.sent = True
        self.tell(FirstChunk(), ends_call=False)

    @precondition(lambda self: self.decoding() and not self.streaming)
    @rule(replica=st.sampled_from("vwxyz"), resumable=st.booleans())
    def decode_dies(self, replica: str, resumable: bool) -> None:
        assert isinstance(self.running, CallDecode)
        before = self.running
        if replica in before.exclude:
            return
        self.tell(DecodeLost(replica, resumable))
        if isinstance(self.running, CallDecode):
            assert self.running.exclude == before.exclude | {replica}
            assert self.running.ticket == before.ticket

    @precondition(lambda self: self.decoding() and not self.streaming)
    @rule()
    def no_decode(self) -> None:
        assert isinstance(self.running, CallDecode)
        before = self.running
        self.tell(DecodeLost(None))
        if isinstance(self.running, CallDecode):
            assert not self.running.exclude
            assert self.running.ticket == before.ticket

    @precondition(lambda self: self.streaming)
    @rule(replica=st.sampled_from("vwxyz"), resumable=st.booleans())
    def stream_breaks(self, replica: str, resumable: bool) -> None:
        assert isinstance(self.running, CallDecode)
        before = self.running
        if replica in before.exclude:
            return
        self.rounds.append([])
        self.tell(DecodeLost(replica, resumable))
        if self.running is not None:
            assert resumable, "goes on although nobody can"
            assert self.decoding() == self.bypass
            assert not (self.decoding() and self.running.exclude <= before.exclude)

    @precondition(decoding)
    @rule()
    def decode_ends(self) -> None:
        assert isinstance(self.running, CallDecode)
        if self.streaming and self.client_here:
            self.consumed |= self.held()
        self.tell(DecodeEnded())

    @rule()
    def client_leaves(self) -> None:
        self.client_here = False
        self.tell(ClientGone(), ends_call=False)
        assert self.finished()

    @precondition(lambda self: self.finished())
    @rule(
        event=st.sampled_from(
            [
                PrefillLost("a"),
                PrefillLost(None),
                Refused(BAD),
                FirstChunk(),
                DecodeLost("v", resumable=True),
                DecodeLost(None),
                DecodeEnded(),
                TicketUnread(),
                ClientGone(),
            ]
        )
    )
    def late_or_twice(self, event: Event) -> None:
        before = len(self.answers), len(self.given_up), len(self.calls)
        self.tell(event, ends_call=False)
        assert (len(self.answers), len(self.given_up), len(self.calls)) == before

    # -- what always holds --

    @invariant()
    def never_leaked(self) -> None:
        """Every ticket is consumed or given up, once."""
        told = [handoff_id for _, handoff_id in self.given_up]
        assert len(told) == len(set(told)), "given up twice"
        assert not self.consumed & set(told), "given up although decode has it"
        assert all(self.offered[handoff_id] == owner for owner, handoff_id in self.given_up)
        assert self.consumed | set(told) | self.held() >= set(self.offered), "left behind"
        if self.finished():
            assert self.consumed | set(told) == set(self.offered)

    @invariant()
    def never_stuck(self) -> None:
        """What is not over waits for a call, which ends in one way or another."""
        if self.state.stage not in (Stage.NEW, Stage.FINISHED):
            assert self.running is not None
        if self.finished() and self.client_here:
            assert self.sent or self.answers, "no answer"
            assert self.running is None

    @invariant()
    def never_wrong(self) -> None:
        """One answer; after output an error can only be an event; no ticket of another round."""
        assert len(self.answers) <= 1
        assert all(answer.streaming == self.sent for answer in self.answers)
        if isinstance(self.running, CallDecode) and self.client_here:
            assert not self.held() & {handoff_id for _, handoff_id in self.given_up}

    @invariant()
    def budgets_and_pauses_are_kept(self) -> None:
        decodes = [call for call in self.calls if isinstance(call, CallDecode)]
        assert len(decodes) <= self.attempts
        pauses = [call.pause_s for call in decodes]
        assert pauses == sorted(pauses)
        for prefills in self.rounds:
            assert len(prefills) <= self.attempts
            pauses = [call.pause_s for call in prefills]
            assert pauses == pytest.approx([0.0, 0.075, 0.1125][: len(pauses)])

    @invariant()
    def replicas_that_were_lost_are_not_asked_again(self) -> None:
        if isinstance(self.running, CallPrefill):
            assert self.running.exclude == self.lost


AnyOrder.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
