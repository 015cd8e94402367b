"""What the connector counts."""

from __future__ import annotations

from transfer.connector.stats import TransferStats


def test_what_befell_a_record_is_counted_once() -> None:
    stats = TransferStats()
    stats.count_overwritten(0)
    assert stats.take() is None
    stats.count_overwritten(2)
    taken = stats.take()
    assert taken is not None
    assert taken.data["overwritten"] == 2
    stats.count_overwritten(2)
    assert stats.take() is None
    stats.count_overwritten(3)
    again = stats.take()
    assert again is not None
    assert taken.aggregate(again).data["overwritten"] == 3
