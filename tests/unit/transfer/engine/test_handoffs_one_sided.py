"""Reads that the owner only admits and confirms: its processor moves no byte of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.transfers.handoffs import GRANT, READER, TTL_S, Clock, claim, make_table, offer
from transfer.engine.owning import handoffs as module
from transfer.engine.owning.handoffs import HandoffTable
from transfer.errors import HandoffRefused
from transfer.spans import block_spans
from transfer.types import Claim, SpanArray


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> HandoffTable:
    return make_table(clock)


def begin_one_sided(
    table: HandoffTable, read_id: str, proof: Claim | None = None, spans: SpanArray = GRANT
) -> None:
    table.begin_one_sided_read(READER, proof or claim(), spans, read_id)


def test_a_one_sided_read_is_confirmed_by_its_id_again_and_again(table: HandoffTable) -> None:
    table.offer(offer())
    begin_one_sided(table, "first")
    begin_one_sided(table, "second")
    begin_one_sided(table, "second")
    for _ in range(2):
        table.release(claim(), used=True, read_id="second")
    with pytest.raises(HandoffRefused, match="another read"):
        table.release(claim(), used=True, read_id="first")
    with pytest.raises(HandoffRefused, match="another read"):
        table.release(claim(), used=True)
    with pytest.raises(HandoffRefused, match="released"):
        begin_one_sided(table, "third")


def test_one_sided_reads_do_not_keep_blocks(table: HandoffTable) -> None:
    table.offer(offer())
    begin_one_sided(table, "id")
    table.abort("h", "preempted")
    assert [one.handoff_id for one in table.take_ended()] == ["h"]
    with pytest.raises(HandoffRefused, match="preempted"):
        table.release(claim(), used=True, read_id="id")


def test_one_sided_reads_must_begin_before_they_are_confirmed(table: HandoffTable) -> None:
    table.offer(offer(readers=2))
    begin_one_sided(table, "id", claim(reader="a"))
    for reader, read_id in (("a", "other"), ("b", "id")):
        with pytest.raises(HandoffRefused, match="never began"):
            table.release(claim(reader=reader), used=True, read_id=read_id)
    table.release(claim(reader="a"), used=True, read_id="id")


def test_one_sided_reads_are_admitted_like_others(table: HandoffTable, clock: Clock) -> None:
    table.offer(offer())
    with pytest.raises(HandoffRefused, match="outside"):
        begin_one_sided(table, "id", spans=block_spans(1 << 20, 64, 64, [3]))
    with pytest.raises(HandoffRefused, match="uint64"):
        begin_one_sided(table, "id", spans=np.zeros((1, 3), dtype=np.uint64))
    with pytest.raises(HandoffRefused, match="read id"):
        begin_one_sided(table, "")
    begin_one_sided(table, "id")
    with pytest.raises(HandoffRefused, match="read id"):
        begin_one_sided(table, "id", claim(reader="thief"))
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
        table.release(claim(), used=True, read_id="id")
