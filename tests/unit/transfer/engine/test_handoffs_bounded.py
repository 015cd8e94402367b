"""What the holder of one token can make an owner keep and reckon."""

from __future__ import annotations

import pytest

from tests.support.transfers.handoffs import (
    GRANT,
    READER,
    Clock,
    begin,
    claim,
    live,
    make_table,
    offer,
)
from transfer.engine.handoff import HandoffState
from transfer.engine.owning import handoffs as module
from transfer.engine.owning.handoffs import MAX_SHARE, HandoffTable
from transfer.errors import HandoffRefused


@pytest.fixture
def table() -> HandoffTable:
    return make_table(Clock())


def test_names_of_readers_are_bounded(table: HandoffTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES_PER_READER", 2)
    table.offer(offer(readers=2))
    table.release(claim(reader="released", share=9), used=True)
    for name in ("a", "b", "c", "a"):
        table.end_read(begin(table, claim(reader=name)))
    one_more = claim(reader="one more", share=9)
    with pytest.raises(HandoffRefused, match="too many names"):
        begin(table, one_more)
    with pytest.raises(HandoffRefused, match="too many names"):
        table.begin_one_sided_read(READER, one_more, GRANT, "id")
    for used in (True, False):
        with pytest.raises(HandoffRefused, match="too many names"):
            table.release(one_more, used=used)

    for name in ("a", "b"):
        table.release(claim(reader=name), used=True)
    assert [ended.state for ended in table.take_ended()] == [HandoffState.RELEASED]


@pytest.mark.parametrize("share", [0, MAX_SHARE + 1, (1 << 16) - 1])
def test_shares_are_bounded(table: HandoffTable, share: int) -> None:
    table.offer(offer())
    proof = claim(share=share)
    with pytest.raises(HandoffRefused, match=f"share of {share} is not from 1 to {MAX_SHARE}"):
        begin(table, proof)
    with pytest.raises(HandoffRefused, match=f"share of {share} is not from 1 to {MAX_SHARE}"):
        table.release(proof, used=False)
    assert [one.readers_left for one in live(table)] == [1]


def test_as_many_ranks_as_may_share_do(table: HandoffTable) -> None:
    table.offer(offer())
    for rank in range(MAX_SHARE):
        assert table.take_ended() == []
        table.release(claim(reader=f"decode/{rank}", share=MAX_SHARE), used=True)
    assert [ended.state for ended in table.take_ended()] == [HandoffState.RELEASED]
