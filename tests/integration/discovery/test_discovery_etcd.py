"""EtcdDiscovery against a real etcd, with etcd and workers treated badly."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.support.network.link_relays import Link, Relays
from tests.support.network.stand_in_proxy import StandInProxy
from tests.support.scripted.records import worker_record
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import TTL_S, Heard, Session, admin, eventually
from transfer.discovery import make_discovery
from transfer.discovery.base import PeerEventKind
from transfer.discovery.etcd_client import EtcdClient
from transfer.discovery.listing import Listing
from transfer.discovery.record import encode_record, record_key
from transfer.errors import PeerUnknown, PeerUnreachable, TransferCancelled
from transfer.types import PeerId

JOINED, UPDATED, LEFT = PeerEventKind.JOINED, PeerEventKind.UPDATED, PeerEventKind.LEFT

A, B, C = worker_record("a"), worker_record("b"), worker_record("c")


def test_two_sessions_see_each_other_until_one_closes(etcd: EtcdServer, session: Session) -> None:
    one, two = session(etcd), session(etcd)
    heard = Heard(two)
    one.publish(A)
    one.publish(A)
    two.publish(B)
    one.ready(5)
    two.ready(5)
    assert one.wait_for(B.peer, 5) == B
    assert two.wait_for(A.peer, 5) == A
    # Its own record, too, it has from etcd.
    assert two.wait_for(B.peer, 5) == B
    assert two.peers() == (A, B)
    assert one.healthy
    assert two.healthy
    start_s = time.monotonic()
    one.close()
    eventually(lambda: two.lookup(A.peer) is None, 1.0)
    assert time.monotonic() - start_s < 1.0
    eventually(lambda: heard.of(A) == [JOINED, LEFT])
    with pytest.raises(TransferCancelled):
        one.publish(A)


def test_clusters_do_not_see_each_other(etcd: EtcdServer, session: Session) -> None:
    one, two = session(etcd, cluster="blue"), session(etcd, cluster="blue-2")
    one.publish(A)
    one.ready(5)
    two.ready(5)
    with pytest.raises(PeerUnknown, match="etcd at 127"):
        two.wait_for(A.peer, 0.3)


def test_withdrawing_takes_back_one_record(etcd: EtcdServer, session: Session) -> None:
    one, two = session(etcd), session(etcd)
    one.publish(A)
    one.publish(B)
    two.wait_for(A.peer, 5)
    two.wait_for(B.peer, 5)
    one.withdraw(A.peer)
    eventually(lambda: two.peers() == (B,), 2.0)
    one.withdraw(B.peer)
    eventually(lambda: two.peers() == (), 2.0)
    one.publish(A)
    assert two.wait_for(A.peer, 5) == A


def test_a_bad_record_is_skipped(
    etcd: EtcdServer, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    one = session(etcd)
    with admin(etcd) as client:
        client.put("/baton/default/workers/bad/0", b"{")
        one.ready(5)
        client.put("/baton/default/workers/bad/1", b"\xff")
        client.put(b"/baton/default/workers/\xff/1", b"1")
        client.put(record_key("default", B.peer), encode_record(A))
        one.publish(C)
        assert one.wait_for(C.peer, 5) == C
    assert one.peers() == (C,)
    assert len([r for r in caplog.records if "skipping" in r.getMessage()]) == 4


def test_a_restart_of_etcd_loses_no_event(session: Session) -> None:
    with EtcdServer() as server:
        one, two = session(server), session(server)
        heard = Heard(two)
        one.publish(A)
        two.wait_for(A.peer, 5)
        server.kill()
        eventually(lambda: not two.healthy)
        one.publish(C)
        assert two.lookup(A.peer) == A
        server.start()
        with admin(server) as client:  # before the watch is back, or after: both must do
            client.put(record_key("default", B.peer), encode_record(B))
            client.delete(record_key("default", B.peer))
        assert two.wait_for(C.peer, 10) == C
        eventually(lambda: one.healthy and two.healthy)
        time.sleep(TTL_S + 1)
        assert two.peers() == (A, C)
        assert heard.of(A) == [JOINED]
        assert heard.of(B) == [JOINED, LEFT]


def test_an_etcd_that_lost_its_data_is_filled_again(session: Session) -> None:
    with EtcdServer() as server:
        one, two = session(server), session(server)
        heard = Heard(two)
        with admin(server) as client:
            client.put(record_key("default", B.peer), encode_record(B))
        one.publish(A)
        two.wait_for(A.peer, 5)
        two.wait_for(B.peer, 5)
        server.wipe()
        eventually(lambda: two.peers() == (A,))
        assert heard.of(A) == [JOINED], "a live worker was lost although it came right back"
        with admin(server) as client:
            eventually(lambda: client.get(record_key("default", A.peer))[0] is not None)


def test_a_hung_etcd_stops_nothing(etcd: EtcdServer, session: Session) -> None:
    one, two = session(etcd), session(etcd)
    heard = Heard(two)
    one.publish(A)
    two.wait_for(A.peer, 5)
    etcd.pause()
    time.sleep(6.5)
    assert not two.healthy
    assert two.lookup(A.peer) == A
    etcd.resume()
    eventually(lambda: one.healthy and two.healthy)
    time.sleep(TTL_S + 1)
    assert two.peers() == (A,)
    assert heard.of(A) == [JOINED]
    one.close()
    eventually(lambda: two.peers() == (), 3 * TTL_S)


def test_closing_without_etcd_takes_bounded_time(session: Session) -> None:
    with EtcdServer() as server:
        gone, hung = session(server), session(server)
        gone.publish(A)
        gone.ready(5)
        hung.publish(B)
        hung.ready(5)
        server.pause()
        start_s = time.monotonic()
        hung.close()
        assert time.monotonic() - start_s < 3
        server.kill()
        start_s = time.monotonic()
        gone.close()
        assert time.monotonic() - start_s < 3


def test_compaction_under_a_broken_watch_tells_the_difference(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = worker_record("a", incarnation="second")
    with EtcdServer() as server, admin(server) as client:
        keys = {record.peer: record_key("default", record.peer) for record in (A, B, C)}
        client.put(keys[A.peer], encode_record(A))
        client.put(keys[B.peer], encode_record(B))
        one = session(server)
        heard = Heard(one)
        one.ready(5)
        assert one.peers() == (A, B)
        list_prefix = EtcdClient.list_prefix
        meddled = threading.Event()

        def meddle(self: EtcdClient, prefix: str) -> Listing:
            """The session lists again after the cut: now etcd moves on, and forgets the way."""
            if meddled.is_set():
                return list_prefix(self, prefix)
            with admin(server) as other:
                other.put(keys[A.peer], encode_record(changed))
                other.delete(keys[B.peer])
                listing = list_prefix(self, prefix)
                compacted = other.put(keys[C.peer], encode_record(C)).header.revision
                other.compact(compacted, physical=True)
            meddled.set()
            return listing

        monkeypatch.setattr(EtcdClient, "list_prefix", meddle)
        one._watch_loop.connector.close()  # type: ignore[attr-defined]
        eventually(lambda: one.peers() == (changed, C), 3 * TTL_S)
        assert "compacted" in caplog.text
        eventually(lambda: heard.of(B) == [JOINED, LEFT])
        assert heard.of(A) == [JOINED, UPDATED]
        assert heard.of(C) == [JOINED]


def test_a_deletion_that_etcd_compacted_away_during_an_outage_is_noticed(session: Session) -> None:
    with EtcdServer() as server, Relays() as relays, admin(server) as client:
        relay = relays.instead_of(f"tcp://{server.endpoint}").removeprefix("tcp://")
        leaving, staying = session(server), session(server)
        staying.publish(B)
        leaving.publish(A)
        watcher = session(server, endpoints=[relay])
        assert watcher.wait_for(A.peer, 5) == A
        assert watcher.wait_for(B.peer, 5) == B
        heard = Heard(watcher)
        relays.set(Link.REFUSED)
        eventually(lambda: not watcher.healthy)
        leaving.close()
        deleted = client.get_response(record_key("default", A.peer)).header.revision
        client.compact(deleted, physical=True)
        relays.set(Link.OPEN)
        eventually(lambda: watcher.healthy)
        # Removals are held back for one lease after an outage.
        assert eventually(lambda: watcher.peers() == (B,)) < TTL_S + 0.5
        eventually(lambda: heard.of(A) == [JOINED, LEFT])
        assert heard.of(B) == [JOINED]
        staying.publish(C)
        assert watcher.wait_for(C.peer, 5) == C


def test_proxies_of_the_environment_are_not_asked(etcd: EtcdServer, session: Session) -> None:
    with StandInProxy() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in proxy.environment.items():
            patch.setenv(name, value)
        one = session(etcd)
        one.publish(A)
        one.ready(5)
        assert one.wait_for(A.peer, 5) == A
        assert proxy.contacts == []


def test_the_next_endpoint_is_used(etcd: EtcdServer, session: Session) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{closed.getsockname()[1]}"
        one = session(etcd, endpoints=[dead, dead.replace("127.0.0.1", "localhost"), etcd.endpoint])
        one.publish(A)
        one.ready(5)
        assert one.wait_for(A.peer, 5) == A


@pytest.mark.parametrize("listening", [False, True])
def test_an_unreachable_etcd_is_one_clear_line(listening: bool, session: Session) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:  # accepts, and never says a word
            server.listen()
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        discovery = make_discovery({"kind": "etcd", "endpoints": [endpoint]})
        with discovery:
            start_s = time.monotonic()
            with pytest.raises(PeerUnreachable, match="start etcd there") as caught:
                discovery.ready(0.7)
            assert time.monotonic() - start_s < 1.2
            assert endpoint in str(caught.value)
            assert "\n" not in str(caught.value)
            assert not discovery.healthy


def test_nothing_is_left_behind(etcd: EtcdServer) -> None:
    def ours() -> set[str]:
        return {t.name for t in threading.enumerate() if t.name.startswith("baton")}

    with make_discovery({"kind": "etcd", "endpoints": [etcd.endpoint]}) as discovery:
        discovery.subscribe(lambda event: None)
        discovery.publish(A)
        discovery.ready(5)
        assert discovery.wait_for(PeerId("a", 0), 5) == A
        assert "healthy" in repr(discovery)
    eventually(lambda: not ours())
    with admin(etcd) as client:
        assert client.get(record_key("default", A.peer))[0] is None
