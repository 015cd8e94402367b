"""The life of a hand-off, with a clock that only moves when told."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.support.transfers.handoffs import (
    GRANT,
    READER,
    TTL_S,
    Clock,
    begin,
    claim,
    live,
    make_table,
    offer,
)
from transfer.engine.handoff import HandoffState
from transfer.engine.owning import handoffs as module
from transfer.engine.owning.handoffs import HandoffTable
from transfer.errors import HandoffNotReady, HandoffRefused, RegistrationError
from transfer.spans import block_spans
from transfer.types import PeerId, ReaderProcess, SpanArray


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
    return make_table(clock)


def ends(table: HandoffTable) -> list[tuple[str, HandoffState]]:
    return [(ended.handoff_id, ended.state) for ended in table.take_ended()]


def test_word_of_an_end_comes_when_the_blocks_are_free(clock: Clock) -> None:
    told = Revoked()
    table = HandoffTable("start-1", clock, on_end=told)
    table.offer(offer())
    table.offer(offer("other"))
    permit = begin(table)
    table.end_read(begin(table, claim("other")))
    table.abort("h", "")
    assert (told.times, table.take_ended()) == (0, [])
    table.end_read(permit)
    assert (told.times, len(table.take_ended())) == (1, 1)
    table.release(claim("other"), used=True)
    assert (told.times, len(table.take_ended())) == (2, 1)


def test_read_and_release(table: HandoffTable, clock: Clock) -> None:
    table.offer(offer())
    assert [one.state for one in live(table)] == [HandoffState.OFFERED]
    table.end_read(begin(table))
    assert [one.state for one in live(table)] == [HandoffState.READING]
    clock.now += 2
    table.release(claim(), used=True)
    assert live(table) == []
    (ended,) = table.take_ended()
    assert (ended.handoff_id, ended.state) == ("h", HandoffState.RELEASED)
    assert table.take_ended() == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"handoff_id": "other"}, "unknown"),
        ({"incarnation": "start-0"}, "which is now start-1"),
        ({"fence": 8}, "wrong fence"),
    ],
)
def test_wrong_claims_do_nothing(
    table: HandoffTable, wrong: dict[str, str | int], why: str
) -> None:
    table.offer(offer())
    proof = claim(**wrong)  # type: ignore[arg-type]
    with pytest.raises(HandoffRefused, match=why):
        begin(table, proof)
    with pytest.raises(HandoffRefused, match=why):
        table.release(proof, used=True)
    with pytest.raises(HandoffRefused, match=why):
        table.renew(proof)
    with pytest.raises(HandoffRefused, match=why):
        table.abort_by_reader(proof, "")
    with pytest.raises(HandoffRefused, match=why):
        table.secret_of(proof)
    assert [one.state for one in live(table)] == [HandoffState.OFFERED]


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
    assert [one.state for one in live(table)] == [HandoffState.OFFERED]


def test_a_row_across_touching_blocks_is_inside(table: HandoffTable) -> None:
    table.offer(offer())
    begin(table, spans=block_spans(1 << 20, 64, 128, [1]))


@pytest.mark.parametrize("end", ["released", "aborted", "expired"])
def test_an_ended_handoff_is_refused_and_says_why(
    table: HandoffTable, clock: Clock, end: str
) -> None:
    table.offer(offer())
    if end == "released":
        table.release(claim(), used=True)
    elif end == "aborted":
        assert table.abort("h", "the router gave it up")
    else:
        clock.now += TTL_S
    late = claim(reader="late")
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
        table.release(claim(reader=reader), used=True)
    assert ends(table) == []
    assert [one.readers_left for one in live(table)] == [1]
    table.release(claim(reader="c"), used=False)
    assert ends(table) == [("h", HandoffState.RELEASED)]


def test_what_is_still_to_be_offered_is_not_refused(table: HandoffTable) -> None:
    table.offer(offer("earlier"))
    early = claim("later", fence=8)
    with pytest.raises(HandoffNotReady):
        begin(table, early)
    with pytest.raises(HandoffNotReady):
        table.release(early, used=False)
    with pytest.raises(HandoffNotReady):
        table.renew(early)
    with pytest.raises(HandoffRefused, match="which is now start-1"):
        begin(table, claim("later", fence=8, incarnation="start-0"))
    table.offer(replace(offer("later"), fence=8))
    table.release(early, used=False)
    with pytest.raises(HandoffRefused, match="unknown"):
        begin(table, claim("forged", fence=8))


def test_readers_wait_for_an_offer_that_is_not_ready(table: HandoffTable) -> None:
    table.offer(replace(offer(), ready=False))
    table.renew(claim())
    with pytest.raises(HandoffNotReady):
        begin(table)
    with pytest.raises(HandoffNotReady):
        table.begin_one_sided_read(READER, claim(), GRANT, "1")
    assert table.make_ready("h")

    table.end_read(begin(table))
    table.release(claim(), used=True)
    assert ends(table) == [("h", HandoffState.RELEASED)]
    assert not table.make_ready("h")


def test_an_offer_that_is_not_ready_can_be_given_up(table: HandoffTable, clock: Clock) -> None:
    for handoff_id in ("released", "aborted", "expired"):
        table.offer(replace(offer(handoff_id), ready=False))
    table.release(claim("released"), used=False)
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
        begin(table, claim("aborted"))


def test_readers_that_share_count_as_one_together(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    for reader in ("a/0", "a/1", "a/1"):
        table.release(claim(reader=reader, share=3), used=True)
    table.release(claim(reader="b/0", share=2), used=False)
    assert [one.readers_left for one in live(table)] == [1]
    table.release(claim(reader="a/2", share=3), used=True)
    assert ends(table) == []
    table.release(claim(reader="b/1", share=2), used=True)
    assert ends(table) == [("h", HandoffState.RELEASED)]


def test_a_repeated_release_is_answered_alike_after_the_end(table: HandoffTable) -> None:
    table.offer(offer())
    table.release(claim(), used=True)
    table.release(claim(), used=True)
    table.release(claim(), used=False)
    assert len(ends(table)) == 1


def test_a_reader_that_forfeited_gets_no_confirmation(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    table.release(claim(), used=False)
    with pytest.raises(HandoffRefused, match="forfeited"):
        table.release(claim(), used=True)
    with pytest.raises(HandoffRefused, match="has released"):
        begin(table)


def test_reading_and_renewing_begin_the_time_to_live_anew(
    table: HandoffTable, clock: Clock
) -> None:
    table.offer(offer())
    clock.now += TTL_S - 1
    table.renew(claim())
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
    table.release(claim(), used=True)
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
    table.end_read(begin(table, claim("read")))
    table.end_read(begin(table, claim("done")))
    table.release(claim("done"), used=True)
    table.end_read(begin(table, claim("other"), reader=ReaderProcess(PeerId("decode", 1), "d1")))
    table.reader_left(READER.peer, alive=READER.incarnation)
    assert ends(table) == []
    table.reader_left(READER.peer, alive="d2")
    assert ends(table) == [("read", HandoffState.ABORTED)]
    table.reader_left(READER.peer)
    assert ends(table) == []


def test_a_reader_aborts_for_all(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    table.abort_by_reader(claim(), "client gone")
    table.abort_by_reader(claim(), "client gone")
    (ended,) = table.take_ended()
    assert (ended.state, ended.reason) == (HandoffState.ABORTED, "client gone")
    with pytest.raises(HandoffRefused, match="client gone"):
        table.release(claim(), used=True)


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
        table.renew(claim("14"))
    with pytest.raises(HandoffRefused, match="aborted"):
        table.renew(claim("15"))


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
