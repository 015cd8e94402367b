from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.scripted.records import worker_record
from transfer.discovery.base import PeerEvent, PeerEventKind
from transfer.discovery.static import StaticDiscovery
from transfer.errors import ConfigurationError, PeerUnknown, Phase, TransferCancelled
from transfer.types import PeerId

A, B, OWN = worker_record("a"), worker_record("b"), worker_record("own")


@pytest.fixture
def discovery() -> Iterator[StaticDiscovery]:
    with StaticDiscovery([B, A]) as discovery:
        yield discovery


def test_listed_peers_are_there_from_the_start(discovery: StaticDiscovery) -> None:
    discovery.ready(0)
    assert discovery.healthy
    assert discovery.peers() == (A, B)
    assert discovery.lookup(A.peer) == A
    assert discovery.lookup(PeerId("a", 1)) is None
    assert repr(discovery) == "<StaticDiscovery 2 listed, 0 own>"


def test_an_own_record_comes_and_goes(discovery: StaticDiscovery) -> None:
    discovery.publish(OWN)
    discovery.publish(OWN)
    assert discovery.lookup(OWN.peer) == OWN
    discovery.withdraw(OWN.peer)
    discovery.withdraw(OWN.peer)
    assert discovery.lookup(OWN.peer) is None


def test_a_listed_peer_cannot_be_withdrawn(discovery: StaticDiscovery) -> None:
    discovery.withdraw(A.peer)
    assert discovery.lookup(A.peer) == A


def test_an_own_record_hides_the_listed_one_until_withdrawn(discovery: StaticDiscovery) -> None:
    own = worker_record("a", incarnation="second")
    discovery.publish(own)
    assert discovery.lookup(A.peer) == own
    discovery.withdraw(A.peer)
    assert discovery.lookup(A.peer) == A


def test_waiting_ends_when_the_peer_comes(discovery: StaticDiscovery) -> None:
    timer = threading.Timer(0.05, discovery.publish, [OWN])
    timer.start()
    assert discovery.wait_for(OWN.peer, 10) == OWN
    timer.join()


def test_waiting_in_vain_names_the_peer(discovery: StaticDiscovery) -> None:
    with pytest.raises(PeerUnknown, match="static list") as caught:
        discovery.wait_for(OWN.peer, 0.01)
    assert (caught.value.phase, caught.value.peer) == (Phase.DISCOVER, "own/0")


def test_closing_ends_a_wait(discovery: StaticDiscovery) -> None:
    timer = threading.Timer(0.05, discovery.close)
    timer.start()
    with pytest.raises(PeerUnknown, match="closed"):
        discovery.wait_for(OWN.peer, 10)
    timer.join()


def test_a_closed_one_can_be_read_but_not_changed(discovery: StaticDiscovery) -> None:
    discovery.close()
    discovery.close()
    assert discovery.peers() == (A, B)
    assert not discovery.healthy
    with pytest.raises(TransferCancelled):
        discovery.publish(OWN)
    with pytest.raises(TransferCancelled):
        discovery.ready(1)


def test_a_subscriber_hears_all_in_order_on_another_thread(discovery: StaticDiscovery) -> None:
    events: queue.Queue[tuple[PeerEvent, int]] = queue.Queue()
    discovery.subscribe(lambda event: events.put((event, threading.get_ident())))
    again = worker_record("own", incarnation="second")
    discovery.publish(OWN)
    discovery.publish(OWN)
    discovery.publish(again)
    discovery.withdraw(OWN.peer)
    heard = [events.get(timeout=5) for _ in range(5)]
    assert {event.record for event, _ in heard[:2]} == {A, B}
    assert [event for event, _ in heard[2:]] == [
        PeerEvent(PeerEventKind.JOINED, OWN),
        PeerEvent(PeerEventKind.UPDATED, again),
        PeerEvent(PeerEventKind.LEFT, again),
    ]
    assert threading.get_ident() not in {thread for _, thread in heard}


def test_an_unsubscribed_listener_hears_no_more(discovery: StaticDiscovery) -> None:
    first: queue.Queue[PeerEvent] = queue.Queue()
    second: queue.Queue[PeerEvent] = queue.Queue()
    unsubscribe = discovery.subscribe(first.put)
    discovery.subscribe(second.put)
    for _ in range(2):
        first.get(timeout=5)
        second.get(timeout=5)
    unsubscribe()
    unsubscribe()
    discovery.publish(OWN)
    assert second.get(timeout=5).record == OWN
    assert first.empty()


def test_a_listener_that_raises_is_logged_and_called_again(
    discovery: StaticDiscovery, caplog: pytest.LogCaptureFixture
) -> None:
    heard: queue.Queue[PeerEvent] = queue.Queue()

    def listener(event: PeerEvent) -> None:
        heard.put(event)
        raise RuntimeError("of the listener")

    with caplog.at_level(logging.ERROR):
        discovery.subscribe(listener)
        discovery.publish(OWN)
        for _ in range(3):
            heard.get(timeout=5)
    assert "a discovery listener raised" in caplog.text


def test_a_peer_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        StaticDiscovery([A, worker_record("a", port=7001)])


def test_an_engine_that_is_not_listed_is_sought_where_any_is(discovery: StaticDiscovery) -> None:
    anybody = replace(worker_record("*", incarnation=""), addresses=("tcp://127.0.0.1:9000",))
    with StaticDiscovery([A, anybody]) as other:
        other.publish(OWN)
        found = other.wait_for(PeerId("who knows", 0), 0.0)
        assert found == replace(anybody, peer=PeerId("who knows", 0))
        assert other.lookup(A.peer) == A
        assert other.lookup(OWN.peer) == OWN
        assert other.lookup(PeerId("who knows", 1)) is None
    assert discovery.lookup(PeerId("who knows", 0)) is None
