"""How a worker looks after its record in a real etcd: its lease, and what befalls the key."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.support.scripted.records import worker_record
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import TTL_S, Heard, Session, admin, eventually
from transfer.discovery.base import PeerEventKind
from transfer.discovery.etcd_client import EtcdClient
from transfer.discovery.own_records import OwnRecords
from transfer.discovery.record import encode_record, record_key

ROOT = Path(__file__).resolve().parents[3]
JOINED, UPDATED, LEFT = PeerEventKind.JOINED, PeerEventKind.UPDATED, PeerEventKind.LEFT

A, B = worker_record("a"), worker_record("b")


def test_a_restarted_worker_overwrites_its_record_and_is_not_taken_back(
    etcd: EtcdServer, session: Session
) -> None:
    old, new, other = session(etcd), session(etcd), session(etcd)
    heard = Heard(other)
    again = worker_record("a", incarnation="second", port=7001)
    old.publish(A)
    other.wait_for(A.peer, 5)
    with admin(etcd) as client:
        _, meta = client.get(record_key("default", A.peer))
        new.publish(again)
        eventually(lambda: other.lookup(A.peer) == again)
        # The old one finds the place taken while it has its lease, and when it has lost it, too.
        assert eventually(lambda: old.superseded) < TTL_S
        assert old.overwritten == 1
        client.revoke_lease(meta.lease_id)
    time.sleep(TTL_S)
    assert old.superseded
    assert not new.superseded
    assert new.overwritten == 0
    old.close()
    time.sleep(0.3)
    assert other.lookup(A.peer) == again
    eventually(lambda: heard.of(A) == [JOINED, UPDATED])


def test_a_killed_worker_is_gone_within_its_lease(etcd: EtcdServer, session: Session) -> None:
    program = f"""
        import time
        from tests.support.scripted.records import worker_record
        from transfer.discovery import make_discovery
        d = make_discovery(
            {{"kind": "etcd", "endpoints": ["{etcd.endpoint}"], "lease_ttl_s": {TTL_S}}})
        d.publish(worker_record("a"))
        d.ready(10)
        print("ready", flush=True)
        time.sleep(60)
    """
    observer = session(etcd)
    observer.ready(5)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE
    ) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            observer.wait_for(A.peer, 5)
            time.sleep(TTL_S + 0.5)
            assert observer.lookup(A.peer) == A, "it was not kept alive"
        finally:
            worker.kill()
    # etcd looks for expired leases twice a second.
    assert eventually(lambda: observer.lookup(A.peer) is None) < TTL_S + 1.5


def test_the_lease_that_was_granted_counts(
    session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted_s = 6  # etcd grants no less than one and a half times its election timeout
    refreshed: list[str] = []
    refresh = EtcdClient.refresh

    def count(self: EtcdClient, lease_id: int) -> None:
        refreshed.append(threading.current_thread().name)
        refresh(self, lease_id)

    monkeypatch.setattr(EtcdClient, "refresh", count)
    with EtcdServer("--election-timeout", "4000", "--heartbeat-interval", "400") as server:
        worker, watcher = session(server), session(server)
        worker.publish(A)
        assert watcher.wait_for(A.peer, 5) == A
        words = f"lease_ttl_s is {TTL_S}, but etcd grants leases of {granted_s} s"
        eventually(lambda: caplog.text.count(words) == 2)  # each of them says so
        refreshed.clear()
        time.sleep(granted_s + 2)
        assert watcher.lookup(A.peer) == A, "it was not kept alive"
        assert 6 <= len(refreshed) <= 10, "not every third of the granted time"
        server.pause()
        worker.close()
        assert f"stay until their lease of {granted_s} s ends" in caplog.text
        server.resume()
        # etcd looks for expired leases twice a second.
        assert eventually(lambda: watcher.lookup(A.peer) is None, 30) < 2 * granted_s + 2


def test_a_lost_lease_is_replaced_with_the_same_incarnation(
    etcd: EtcdServer, session: Session
) -> None:
    one, two = session(etcd), session(etcd)
    heard = Heard(two)
    one.publish(A)
    two.wait_for(A.peer, 5)
    with admin(etcd) as client:
        _, meta = client.get(record_key("default", A.peer))
        client.revoke_lease(meta.lease_id)
    eventually(lambda: heard.of(A) == [JOINED, LEFT, JOINED], TTL_S)
    assert two.lookup(A.peer) == A
    time.sleep(TTL_S + 1)
    assert heard.of(A) == [JOINED, LEFT, JOINED], "the new lease was not kept alive"


def test_a_deleted_record_is_written_again(etcd: EtcdServer, session: Session) -> None:
    one, two = session(etcd), session(etcd)
    heard = Heard(two)
    one.publish(A)
    two.wait_for(A.peer, 5)
    with admin(etcd) as client:
        client.delete(record_key("default", A.peer))
    eventually(lambda: heard.of(A) == [JOINED, LEFT, JOINED], 1.0)


SECOND = worker_record("a", incarnation="second")
MOVED = worker_record("a", port=7001)


@pytest.mark.parametrize("under", ["no lease", "its lease"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"garbage", "record is not JSON"),
        (b"", "record is not JSON"),
        (encode_record(B), "record is of b/0 but lies under another worker's key"),
        (encode_record(MOVED), "addresses tcp://127.0.0.1:7001"),
        (encode_record(SECOND), "incarnation second, which keeps no lease"),
    ],
    ids=["garbage", "nothing", "another-worker", "address", "incarnation"],
)
def test_an_overwritten_record_is_written_again(
    value: bytes,
    words: str,
    under: str,
    etcd: EtcdServer,
    session: Session,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _overwrite(etcd, session, value, keep_lease=under == "its lease")
    (line,) = [r.getMessage() for r in caplog.records if "overwritten" in r.getMessage()]
    assert line.startswith("the record of worker a/0 was overwritten in etcd (")
    assert words in line


def test_a_record_without_its_lease_is_written_again(
    etcd: EtcdServer, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    _overwrite(etcd, session, encode_record(A), keep_lease=False)
    assert "overwritten in etcd (by itself, but not under its lease)" in caplog.text


def test_an_owner_whose_watch_tells_nothing_finds_its_record_overwritten(
    etcd: EtcdServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnRecords, "doubt", lambda *_: False)
    _overwrite(etcd, session, b"garbage", keep_lease=False)


def _overwrite(etcd: EtcdServer, session: Session, value: bytes, *, keep_lease: bool) -> None:
    """Put a value over an owner's key and see that it has the key again, once and for all."""
    owner, reader = session(etcd), session(etcd)
    owner.publish(A)
    assert reader.wait_for(A.peer, 5) == A
    key = record_key("default", A.peer)
    with admin(etcd) as client:
        _, before = client.get(key)
        client.put(key, value, lease=before.lease_id if keep_lease else None)

        def restored() -> bool:
            found, meta = client.get(key)
            return bool(found == encode_record(A) and meta.lease_id == before.lease_id)

        assert eventually(restored) < TTL_S
        eventually(lambda: reader.lookup(A.peer) == A)
        _, after = client.get(key)
        time.sleep(TTL_S / 2)
        assert client.get(key)[1].mod_revision == after.mod_revision, "it was written twice"
        owner.close()
        eventually(lambda: client.get(key)[0] is None, 1.0)
    assert owner.overwritten == 1
    assert not owner.superseded


def test_a_name_goes_back_to_its_owner_when_the_other_start_has_gone(
    etcd: EtcdServer, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = session(etcd), session(etcd)
    owner.publish(A)
    reader.wait_for(A.peer, 5)
    key = record_key("default", A.peer)
    with admin(etcd) as client:
        lease = client.lease(60)
        client.put(key, encode_record(SECOND), lease=lease)
        assert eventually(lambda: owner.superseded) < TTL_S
        client.put(key, b"garbage", lease=lease)  # over that one's, who will mend it
        time.sleep(TTL_S)
        assert client.get(key)[0] == b"garbage"
        assert "worker a/0 was replaced by incarnation second; not registering first" in caplog.text
        lease.revoke()
        assert eventually(lambda: reader.lookup(A.peer) == A) < TTL_S
    assert not owner.superseded
    assert owner.overwritten == 1


def test_two_who_contest_a_key_do_so_at_the_pace_of_the_lease(
    etcd: EtcdServer, session: Session
) -> None:
    owner = session(etcd)
    owner.publish(A)
    owner.ready(5)
    end_s = time.monotonic() + 2 * TTL_S
    with admin(etcd) as client:
        while time.monotonic() < end_s:
            client.put(record_key("default", A.peer), b"garbage")
            time.sleep(0.01)
    assert 3 <= owner.overwritten <= 8


def test_a_busy_interpreter_keeps_its_lease(etcd: EtcdServer, session: Session) -> None:
    one = session(etcd)
    one.publish(A)
    one.ready(5)
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(2_000_000))  # one bytecode: the GIL is not given up within it

    burner = threading.Thread(target=burn)
    key = record_key("default", A.peer)
    with admin(etcd) as client:
        _, before = client.get(key)
        burner.start()
        try:
            time.sleep(2 * TTL_S)
        finally:
            stop.set()
            burner.join()
        _, after = client.get(key)
    assert after is not None
    assert (after.lease_id, after.mod_revision) == (before.lease_id, before.mod_revision)
