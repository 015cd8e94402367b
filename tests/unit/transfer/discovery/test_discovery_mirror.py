from __future__ import annotations

import logging
import math
import queue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scripted.records import worker_record
from transfer.discovery.base import PeerEvent
from transfer.discovery.listing import KeyValue, Listing
from transfer.discovery.mirror import PrefixMirror
from transfer.discovery.record import encode_record, record_key
from transfer.discovery.view import PeerView
from transfer.types import PeerId


def put(name: str, revision: int, incarnation: str = "first") -> KeyValue:
    record = worker_record(name, incarnation=incarnation)
    return KeyValue(record_key("default", record.peer), encode_record(record), revision)


def gone(name: str, revision: int) -> KeyValue:
    return KeyValue(record_key("default", PeerId(name, 0)), None, revision)


class Bench:
    """A mirror and what its view shows."""

    def __init__(self) -> None:
        self.view = PeerView()
        self.mirror = PrefixMirror(self.view, replay_s=2.0)

    def begin(self, revision: int, *items: KeyValue, now_s: float = 100.0) -> int:
        return self.mirror.begin(Listing(revision, items), now_s)

    def apply(self, revision: int, *items: KeyValue, now_s: float = 100.0) -> None:
        self.mirror.apply(Listing(revision, items), now_s)

    @property
    def names(self) -> str:
        return "".join(record.peer.engine_id for record in self.view.all())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_is_listed_at_first(bench: Bench) -> None:
    assert not bench.mirror.listed
    assert bench.mirror._revision == 0


def test_the_watch_starts_right_behind_the_first_listing(bench: Bench) -> None:
    assert bench.begin(7, put("a", 3)) == 8
    assert bench.mirror.listed
    bench.apply(9, put("b", 8), gone("a", 9))
    assert (bench.names, bench.mirror._revision) == ("b", 9)


def test_a_broken_watch_resumes_where_it_broke_off(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    bench.apply(8, put("b", 8))
    assert bench.begin(12, put("b", 8), put("c", 10)) == 9
    assert bench.names == "ab"
    bench.apply(12, gone("a", 9), put("c", 10), put("d", 11), gone("d", 12))
    assert (bench.names, bench.mirror._revision) == ("bc", 12)


def test_what_came_and_went_in_an_outage_is_told(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    events: queue.Queue[PeerEvent] = queue.Queue()
    bench.view.subscribe(events.put)
    assert bench.begin(20, put("a", 3)) == 8
    bench.apply(20, put("b", 15), gone("b", 16))
    heard = [events.get(timeout=5) for _ in range(3)]
    bench.view.close()
    assert [(event.kind, event.record.peer.engine_id) for event in heard] == [
        ("joined", "a"),
        ("joined", "b"),
        ("left", "b"),
    ]
    assert bench.mirror._revision == 20


def test_at_the_same_revision_the_listing_is_the_whole_truth(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    assert bench.begin(7, put("a", 3)) == 8


def test_several_changes_of_one_revision_all_count(bench: Bench) -> None:
    bench.begin(7, put("a", 3), put("b", 4))
    bench.apply(8, gone("a", 8), gone("b", 8))
    assert bench.names == ""


def test_changes_already_known_are_skipped(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    bench.apply(9, gone("a", 2), put("b", 8))
    assert bench.names == "ab"


@pytest.mark.parametrize(
    "listing",
    [
        Listing(4, (put("b", 4),)),  # an older revision
        Listing(9, (put("b", 3),)),  # a revision that was another key's
        Listing(7, (put("b", 7),)),  # the same revision, other keys
    ],
)
def test_an_etcd_that_lost_its_data_is_noticed(bench: Bench, listing: Listing) -> None:
    bench.begin(7, put("a", 3))
    assert bench.mirror.begin(listing, 100.0) == listing.revision + 1
    assert bench.names == "b"


def test_a_replaced_history_is_noticed_once_it_is_replayed(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    assert bench.begin(30, put("b", 20)) == 8
    bench.apply(30, put("b", 20))
    assert bench.names == "b"


def test_a_replayed_history_is_checked_before_newer_changes(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    bench.begin(30, put("b", 20))
    bench.apply(31, put("b", 20), put("c", 31))
    assert bench.names == "bc"


def test_what_the_watch_never_tells_is_taken_from_the_listing(bench: Bench) -> None:
    bench.begin(7, put("a", 3), put("b", 4))
    assert bench.mirror.settle(100.0) == math.inf
    assert bench.begin(9, put("b", 4), put("c", 9)) == 8
    assert bench.mirror.settle(101.9) == 102.0
    assert bench.names == "ab"
    assert bench.mirror.settle(102.0) == math.inf
    assert (bench.names, bench.mirror._revision) == ("bc", 9)
    bench.apply(10, gone("a", 8), put("c", 9), put("d", 10))
    assert bench.names == "bcd"


def test_a_removal_that_only_the_listing_tells_is_held_back_too(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    bench.mirror.disturbed(100.0, hold_s=5.0)
    bench.begin(8)
    assert bench.mirror.settle(102.0) == 105.0
    assert bench.names == "a"
    assert bench.mirror.settle(105.0) == math.inf
    assert bench.names == ""


def test_after_compaction_the_difference_is_told(bench: Bench) -> None:
    bench.begin(7, put("a", 3), put("b", 4))
    bench.mirror.forget()
    assert bench.begin(50, put("b", 4), put("c", 40)) == 51
    assert bench.names == "bc"


def test_a_bad_record_is_logged_once_and_skipped(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bad = KeyValue("/baton/default/workers/x/0", b"{", 5)
    with caplog.at_level(logging.WARNING):
        bench.begin(7, put("a", 3), bad)
        bench.mirror.forget()
        bench.begin(8, put("a", 3), bad)
    assert bench.names == "a"
    assert len(caplog.records) == 1
    assert "/baton/default/workers/x/0" in caplog.text


def test_a_record_overwritten_by_a_bad_one_is_gone_until_it_is_good_again(bench: Bench) -> None:
    bench.begin(7, put("a", 3))
    bench.apply(8, KeyValue(put("a", 3).key, b"?", 8))
    assert bench.names == ""
    bench.apply(9, put("a", 9))
    assert bench.names == "a"


def test_removals_are_held_back_after_a_disturbance(bench: Bench) -> None:
    bench.begin(7, put("a", 3), put("b", 4))
    bench.mirror.disturbed(100.0, hold_s=5.0)
    bench.apply(8, gone("a", 8), gone("b", 8), now_s=101.0)
    bench.mirror.settle(104.9)
    assert bench.names == "ab"
    bench.apply(9, put("a", 9, "second"), now_s=102.0)
    bench.mirror.settle(105.0)
    assert bench.names == "a"
    bench.apply(10, gone("a", 10), now_s=105.0)
    assert bench.names == ""


@given(st.data())
def test_any_interruption_leads_to_the_state_of_etcd(data: st.DataObject) -> None:
    """One etcd with a random history; the watch breaks at random points, at times compacted.

    At times a compaction also takes the deletion that the watch would have begun with.
    """
    bench, store, history, revision = Bench(), dict[str, KeyValue](), list[KeyValue](), 1
    start = bench.begin(revision)
    for _ in range(data.draw(st.integers(1, 8))):
        for name in data.draw(st.lists(st.sampled_from("abc"), max_size=4)):
            revision += 1
            key = gone(name, 0).key
            if key in store and data.draw(st.booleans()):
                del store[key]
                history.append(gone(name, revision))
            else:
                store[key] = put(name, revision, f"i{revision}")
                history.append(store[key])
        match data.draw(st.sampled_from(["deliver", "break", "compact"])):
            case "break":
                start = bench.begin(revision, *store.values())
            case "compact":
                bench.mirror.forget()
                start = bench.begin(revision, *store.values())
        missed = [item for item in history if item.mod_revision >= start]
        if missed and missed[0].value is None and data.draw(st.booleans()):
            bench.begin(revision, *store.values())
            history.remove(missed.pop(0))
        size = data.draw(st.integers(1, 3))
        for index in range(0, len(missed), size):
            bench.apply(revision, *missed[index : index + size])
        start = bench.mirror._revision + 1
    bench.mirror.settle(math.inf)
    assert {record.peer.engine_id: record.incarnation for record in bench.view.all()} == {
        key.split("/")[-2]: f"i{item.mod_revision}" for key, item in store.items()
    }
