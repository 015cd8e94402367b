"""The life of a hand-off, with a clock that only moves when told."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from transfer.engine import handoffs as module
from transfer.engine.handoff import HandoffState, Offer, Permit
from transfer.engine.handoffs import HandoffTable
from transfer.errors import HandoffNotReady, HandoffRefused, RegistrationError
from transfer.spans import block_spans
from transfer.transports.base import Caller
from transfer.types import Credentials, PeerId, SpanArray

TTL_S = 10.0
READER = Caller(PeerId("decode", 0), "d1")
GRANT = block_spans(1 << 20, 64, 64, [1, 2, 9])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Revoked:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> HandoffTable:
    return HandoffTable("start-1", clock, on_end=lambda: None)


def offer(handoff_id: str = "h", *, readers: int = 1, grant: SpanArray = GRANT) -> Offer:
    return Offer(handoff_id, 7, "secret", grant, readers, TTL_S, num_blocks=3)


def credentials(
    handoff_id: str = "h",
    *,
    incarnation: str = "start-1",
    fence: int = 7,
    token: str = "secret",
    reader: str = "r",
    share: int = 1,
) -> Credentials:
    return Credentials(handoff_id, incarnation, fence, token, reader, share)


def begin(
    table: HandoffTable,
    proof: Credentials | None = None,
    spans: SpanArray = GRANT,
    caller: Caller = READER,
    revoked: Revoked | None = None,
) -> Permit:
    return table.begin_read(caller, proof or credentials(), spans, revoked or Revoked())


def ends(table: HandoffTable) -> list[tuple[str, HandoffState]]:
    return [(ended.handoff_id, ended.state) for ended in table.take_ended()]


def test_word_of_an_end_comes_when_the_blocks_are_free(clock: Clock) -> None:
    told = Revoked()
    table = HandoffTable("start-1", clock, on_end=told)
    table.offer(offer())
    table.offer(offer("other"))
    permit = begin(table)
    table.end_read(begin(table, credentials("other")))
    table.abort("h", "")
    assert (told.times, table.take_ended()) == (0, [])
    table.end_read(permit)
    assert (told.times, len(table.take_ended())) == (1, 1)
    table.release(credentials("other"), used=True)
    assert (told.times, len(table.take_ended())) == (2, 1)


def test_read_and_release(table: HandoffTable, clock: Clock) -> None:
    table.offer(offer())
    assert [one.state for one in table.snapshot()] == [HandoffState.OFFERED]
    table.end_read(begin(table))
    assert [one.state for one in table.snapshot()] == [HandoffState.READING]
    clock.now += 2
    table.release(credentials(), used=True)
    assert table.snapshot() == []
    (ended,) = table.take_ended()
    assert (ended.state, ended.fence, ended.num_blocks, ended.age_s) == (
        HandoffState.RELEASED,
        7,
        3,
        2.0,
    )
    assert table.take_ended() == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"handoff_id": "other"}, "unknown"),
        ({"incarnation": "start-0"}, "another start"),
        ({"fence": 8}, "wrong fence"),
        ({"token": "Secret"}, "wrong token"),
        ({"token": ""}, "wrong token"),
        ({"token": "gehe\u00efm"}, "wrong token"),
    ],
)
def test_wrong_credentials_do_nothing(
    table: HandoffTable, wrong: dict[str, str | int], why: str
) -> None:
    table.offer(offer())
    proof = credentials(**wrong)  # type: ignore[arg-type]
    with pytest.raises(HandoffRefused, match=why):
        begin(table, proof)
    with pytest.raises(HandoffRefused, match=why):
        table.release(proof, used=True)
    with pytest.raises(HandoffRefused, match=why):
        table.renew(proof)
    with pytest.raises(HandoffRefused, match=why):
        table.abort_by_reader(proof, "")
    assert [one.state for one in table.snapshot()] == [HandoffState.OFFERED]


@pytest.mark.parametrize(
    "spans",
    [
        block_spans(1 << 20, 64, 64, [1, 3]),
        block_spans(1 << 20, 64, 65, [9]),
        block_spans((1 << 20) - 1, 64, 64, [1]),
        np.array([[(1 << 20) + 64, (1 << 64) - 8]], dtype=np.uint64),
        np.array([[(1 << 20) + 64, 0]], dtype=np.uint64),
    ],
)
def test_spans_outside_the_grant_are_refused(table: HandoffTable, spans: SpanArray) -> None:
    table.offer(offer())
    with pytest.raises(HandoffRefused):
        begin(table, spans=spans)
    assert [one.state for one in table.snapshot()] == [HandoffState.OFFERED]


def test_a_row_across_touching_blocks_is_inside(table: HandoffTable) -> None:
    table.offer(offer())
    begin(table, spans=block_spans(1 << 20, 64, 128, [1]))


@pytest.mark.parametrize("end", ["released", "aborted", "expired"])
def test_an_ended_handoff_is_refused_and_says_why(
    table: HandoffTable, clock: Clock, end: str
) -> None:
    table.offer(offer())
    if end == "released":
        table.release(credentials(), used=True)
    elif end == "aborted":
        assert table.abort("h", "the router gave it up")
    else:
        clock.now += TTL_S
    late = credentials(reader="late")
    with pytest.raises(HandoffRefused, match=end):
        begin(table, late)
    with pytest.raises(HandoffRefused, match=end):
        table.release(late, used=True)
    with pytest.raises(HandoffRefused, match=end):
        table.renew(late)
    assert ends(table) == [("h", HandoffState(end))]
    assert not table.abort("h", "again")
    assert ends(table) == []


def test_every_reader_must_release(table: HandoffTable) -> None:
    table.offer(offer(readers=3))
    for reader in ("a", "b", "a", "b"):
        table.release(credentials(reader=reader), used=True)
    assert ends(table) == []
    assert [one.readers_left for one in table.snapshot()] == [1]
    table.release(credentials(reader="c"), used=False)
    assert ends(table) == [("h", HandoffState.RELEASED)]


def test_what_is_still_to_be_offered_is_not_refused(table: HandoffTable) -> None:
    table.offer(offer("earlier"))
    early = credentials("later", fence=8)
    with pytest.raises(HandoffNotReady):
        begin(table, early)
    with pytest.raises(HandoffNotReady):
        table.release(early, used=False)
    with pytest.raises(HandoffNotReady):
        table.renew(early)
    with pytest.raises(HandoffRefused, match="another start"):
        begin(table, credentials("later", fence=8, incarnation="start-0"))
    table.offer(replace(offer("later"), fence=8))
    table.release(early, used=False)
    with pytest.raises(HandoffRefused, match="unknown"):
        begin(table, credentials("forged", fence=8))


def test_readers_wait_for_an_offer_that_is_not_ready(table: HandoffTable) -> None:
    table.offer(replace(offer(), ready=False))
    table.renew(credentials())
    with pytest.raises(HandoffNotReady):
        begin(table)
    with pytest.raises(HandoffNotReady):
        table.begin_one_sided_read(READER, credentials(), GRANT, "1")
    with pytest.raises(HandoffNotReady):
        table.fetch(READER, credentials(), GRANT, lambda *_: pytest.fail("read too early"))
    with pytest.raises(HandoffRefused, match="wrong token"):
        begin(table, credentials(token="guess"))

    assert table.make_ready("h")

    table.end_read(begin(table))
    table.release(credentials(), used=True)
    assert ends(table) == [("h", HandoffState.RELEASED)]
    assert not table.make_ready("h")


def test_an_offer_that_is_not_ready_can_be_given_up(table: HandoffTable, clock: Clock) -> None:
    for handoff_id in ("released", "aborted", "expired"):
        table.offer(replace(offer(handoff_id), ready=False))
    table.release(credentials("released"), used=False)
    table.abort("aborted", "")
    clock.now += TTL_S + 1
    assert table.expire("expired") is None

    assert ends(table) == [
        ("released", HandoffState.RELEASED),
        ("aborted", HandoffState.ABORTED),
        ("expired", HandoffState.EXPIRED),
    ]
    assert not table.make_ready("aborted")
    with pytest.raises(HandoffRefused, match="aborted"):
        begin(table, credentials("aborted"))


def test_readers_that_share_count_as_one_together(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    for reader in ("a/0", "a/1", "a/1"):
        table.release(credentials(reader=reader, share=3), used=True)
    table.release(credentials(reader="b/0", share=2), used=False)
    assert [one.readers_left for one in table.snapshot()] == [1]
    table.release(credentials(reader="a/2", share=3), used=True)
    assert ends(table) == []
    table.release(credentials(reader="b/1", share=2), used=True)
    assert ends(table) == [("h", HandoffState.RELEASED)]


def test_a_repeated_release_is_answered_alike_after_the_end(table: HandoffTable) -> None:
    table.offer(offer())
    table.release(credentials(), used=True)
    table.release(credentials(), used=True)
    table.release(credentials(), used=False)
    assert len(ends(table)) == 1


def test_a_reader_that_forfeited_gets_no_confirmation(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    table.release(credentials(), used=False)
    with pytest.raises(HandoffRefused, match="forfeited"):
        table.release(credentials(), used=True)
    with pytest.raises(HandoffRefused, match="has released"):
        begin(table)


def test_reading_and_renewing_begin_the_time_to_live_anew(
    table: HandoffTable, clock: Clock
) -> None:
    table.offer(offer())
    clock.now += TTL_S - 1
    table.renew(credentials())
    clock.now += TTL_S - 1
    begin(table)
    clock.now += TTL_S - 1
    assert table.expire("h") == clock.now + 1
    clock.now += 1
    assert table.expire("h") is None
    assert table.expire("h") is None
    assert table.expire("never offered") is None


def test_an_end_revokes_reads_and_waits_for_them(table: HandoffTable) -> None:
    table.offer(offer())
    revoked = Revoked()
    permit = begin(table, revoked=revoked)
    table.abort("h", "given up")
    assert not permit.valid
    assert revoked.times == 1
    assert ends(table) == []
    table.end_read(permit)
    table.end_read(permit)
    assert ends(table) == [("h", HandoffState.ABORTED)]


def test_a_release_does_not_cut_the_stream_of_its_own_read(table: HandoffTable) -> None:
    table.offer(offer())
    revoked = Revoked()
    permit = begin(table, revoked=revoked)
    table.release(credentials(), used=True)
    assert revoked.times == 0
    table.end_read(permit)
    assert ends(table) == [("h", HandoffState.RELEASED)]


def test_a_reader_that_dies_has_its_reads_revoked(table: HandoffTable) -> None:
    table.offer(offer())
    revoked = Revoked()
    begin(table, revoked=revoked)
    table.reader_left(READER.peer)
    assert revoked.times == 1


def test_a_reader_that_dies_ends_what_it_was_reading(table: HandoffTable) -> None:
    for handoff_id in ("read", "done", "other"):
        table.offer(offer(handoff_id, readers=2))
    table.end_read(begin(table, credentials("read")))
    table.end_read(begin(table, credentials("done")))
    table.release(credentials("done"), used=True)
    table.end_read(begin(table, credentials("other"), caller=Caller(PeerId("decode", 1), "d1")))
    table.reader_left(READER.peer, alive=READER.incarnation)
    assert ends(table) == []
    table.reader_left(READER.peer, alive="d2")
    assert ends(table) == [("read", HandoffState.ABORTED)]
    table.reader_left(READER.peer)
    assert ends(table) == []


def test_a_reader_aborts_for_all(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    table.abort_by_reader(credentials(), "client gone")
    table.abort_by_reader(credentials(), "client gone")
    (ended,) = table.take_ended()
    assert (ended.state, ended.reason) == (HandoffState.ABORTED, "client gone")
    with pytest.raises(HandoffRefused, match="client gone"):
        table.release(credentials(), used=True)


def test_senseless_offers_are_refused(table: HandoffTable) -> None:
    table.offer(offer())
    with pytest.raises(HandoffRefused, match="before"):
        table.offer(offer())
    with pytest.raises(HandoffRefused):
        table.offer(offer("a", readers=0))
    with pytest.raises(RegistrationError):
        table.offer(offer("b", grant=np.zeros((1, 2), dtype=np.uint64)))
    table.abort("h", "")
    with pytest.raises(HandoffRefused, match="before"):
        table.offer(offer())


def test_memory_of_ended_handoffs_is_bounded(
    table: HandoffTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED_ENDS", 5)
    for number in range(20):
        table.offer(offer(str(number)))
        table.abort(str(number), "")
    assert len(ends(table)) == 20
    with pytest.raises(HandoffRefused, match="unknown"):
        table.renew(credentials("14"))
    with pytest.raises(HandoffRefused, match="aborted"):
        table.renew(credentials("15"))


def test_abort_all(table: HandoffTable) -> None:
    table.offer(offer("a"))
    table.offer(offer("b"))
    table.abort_all("closed")
    assert ends(table) == [("a", HandoffState.ABORTED), ("b", HandoffState.ABORTED)]
    assert repr(table) == "<HandoffTable 0 live, 0 ended>"


def test_threads_take_each_end_once(table: HandoffTable) -> None:
    for number in range(300):
        table.offer(offer(str(number)))
    taken: list[str] = []

    def work(step: int) -> None:
        for number in range(300):
            if step:
                table.abort(str(number), "")
            taken.extend(ended.handoff_id for ended in table.take_ended())

    threads = [threading.Thread(target=work, args=(step,)) for step in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.extend(ended.handoff_id for ended in table.take_ended())
    assert sorted(taken) == sorted(map(str, range(300)))


class Lives(RuleBasedStateMachine):
    """Whatever happens in whatever order: pinned means confirmed, and every end is told once."""

    offered = Bundle("offered")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = HandoffTable("start-1", self.clock, on_end=lambda: None)
        self.names: list[str] = []
        self.taken: list[str] = []
        self.permits: dict[Permit, str] = {}

    @rule(target=offered, readers=st.integers(1, 2))
    def offer(self, readers: int) -> str:
        self.names.append(str(len(self.names)))
        self.table.offer(offer(self.names[-1], readers=readers))
        return self.names[-1]

    @rule(name=offered, reader=st.sampled_from("ab"))
    def begin(self, name: str, reader: str) -> None:
        try:
            permit = begin(self.table, credentials(name, reader=reader))
        except HandoffRefused:
            return
        assert name not in self.taken
        self.permits[permit] = name

    @rule()
    def end_read(self) -> None:
        if self.permits:
            permit = next(iter(self.permits))
            del self.permits[permit]
            self.table.end_read(permit)

    @rule(name=offered, reader=st.sampled_from("abc"), used=st.booleans())
    def release(self, name: str, reader: str, used: bool) -> None:
        live = {one.handoff_id for one in self.table.snapshot()}
        try:
            self.table.release(credentials(name, reader=reader), used=used)
        except HandoffRefused:
            return
        if name not in live:  # then this reader had released while it was
            self.table.release(credentials(name, reader=reader), used=False)

    @rule(name=offered)
    def renew(self, name: str) -> None:
        try:
            self.table.renew(credentials(name))
        except HandoffRefused:
            return
        assert name not in self.taken

    @rule(name=offered)
    def abort(self, name: str) -> None:
        self.table.abort(name, "")

    @rule()
    def reader_dies(self) -> None:
        self.table.reader_left(READER.peer)

    @rule(seconds=st.floats(0.1, TTL_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for name in self.names:
            self.table.expire(name)

    @rule()
    def take(self) -> None:
        for ended in self.table.take_ended():
            assert ended.handoff_id not in self.taken
            assert ended.handoff_id not in self.permits.values()
            self.taken.append(ended.handoff_id)

    @invariant()
    def live_and_taken_are_apart(self) -> None:
        assert not {one.handoff_id for one in self.table.snapshot()} & set(self.taken)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def begin_one_sided(
    table: HandoffTable, read_id: str, proof: Credentials | None = None, spans: SpanArray = GRANT
) -> None:
    table.begin_one_sided_read(READER, proof or credentials(), spans, read_id)


def test_a_one_sided_read_is_confirmed_by_its_id_again_and_again(table: HandoffTable) -> None:
    table.offer(offer())
    begin_one_sided(table, "first")
    begin_one_sided(table, "second")
    begin_one_sided(table, "second")
    for _ in range(2):
        table.release(credentials(), used=True, read_id="second")
    with pytest.raises(HandoffRefused, match="another read"):
        table.release(credentials(), used=True, read_id="first")
    with pytest.raises(HandoffRefused, match="another read"):
        table.release(credentials(), used=True)
    with pytest.raises(HandoffRefused, match="released"):
        begin_one_sided(table, "third")


def test_one_sided_reads_do_not_keep_blocks(table: HandoffTable) -> None:
    table.offer(offer())
    begin_one_sided(table, "id")
    table.abort("h", "preempted")
    assert [one.handoff_id for one in table.take_ended()] == ["h"]
    with pytest.raises(HandoffRefused, match="preempted"):
        table.release(credentials(), used=True, read_id="id")


def test_one_sided_reads_must_begin_before_they_are_confirmed(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    begin_one_sided(table, "id", credentials(reader="a"))
    for reader, read_id in (("a", "other"), ("b", "id")):
        with pytest.raises(HandoffRefused, match="never began"):
            table.release(credentials(reader=reader), used=True, read_id=read_id)
    table.release(credentials(reader="a"), used=True, read_id="id")


def test_one_sided_reads_are_admitted_like_others(table: HandoffTable, clock: Clock) -> None:
    table.offer(offer())
    with pytest.raises(HandoffRefused, match="wrong token"):
        begin_one_sided(table, "id", credentials(token="guess"))
    with pytest.raises(HandoffRefused, match="outside"):
        begin_one_sided(table, "id", spans=block_spans(1 << 20, 64, 64, [3]))
    with pytest.raises(HandoffRefused, match="uint64"):
        begin_one_sided(table, "id", spans=np.zeros((1, 3), dtype=np.uint64))
    with pytest.raises(HandoffRefused, match="read id"):
        begin_one_sided(table, "")
    begin_one_sided(table, "id")
    with pytest.raises(HandoffRefused, match="read id"):
        begin_one_sided(table, "id", credentials(reader="thief"))
    clock.now += TTL_S
    with pytest.raises(HandoffRefused, match="expired"):
        begin_one_sided(table, "id")


def test_one_sided_reads_are_bounded(table: HandoffTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ONE_SIDED_READS", 2)
    table.offer(offer())
    for read_id in ("a", "b", "a"):
        begin_one_sided(table, read_id)
    with pytest.raises(HandoffRefused, match="too often"):
        begin_one_sided(table, "c")


def test_one_sided_reads_end_with_their_reader(table: HandoffTable) -> None:
    table.offer(offer())
    begin_one_sided(table, "id")
    table.reader_left(READER.peer)
    with pytest.raises(HandoffRefused, match="died"):
        table.release(credentials(), used=True, read_id="id")
