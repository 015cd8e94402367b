"""Discovery with a real etcd that asks for user and password."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyetcd
import pytest

from tests.support.scripted.records import worker_record
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import TTL_S, Heard, Session, admin, eventually
from transfer.discovery.base import PeerEventKind
from transfer.discovery.etcd_client import EtcdClient, WatchStream
from transfer.errors import ConfigurationError

TOKEN_TTL_S = 1
SECRET = "${ETCD_TEST_SECRET}"
JOINED = PeerEventKind.JOINED
A, B = worker_record("a"), worker_record("b")


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_TEST_SECRET", "secret")
    monkeypatch.setenv("ETCD_TEST_WRONG", "wrong")


@contextmanager
def guarded_etcd() -> Iterator[EtcdServer]:
    """With the users ``root``, ``baton`` and ``guest``, who has no rights. Tokens end early."""
    with EtcdServer("--auth-token-ttl", str(TOKEN_TTL_S)) as server:
        server.enable_users("secret")
        yield server


def test_user_and_password(session: Session) -> None:
    with guarded_etcd() as server:
        one = session(server, user="baton", password=SECRET)
        two = session(server, user="baton", password=SECRET)
        heard = Heard(two)
        one.publish(A)
        one.ready(5)
        assert two.wait_for(A.peer, 5) == A
        time.sleep(TTL_S + 2)
        two.publish(B)
        assert one.wait_for(B.peer, 5) == B
        assert heard.of(A) == [JOINED]
        for user, password, words in [
            ("baton", "${ETCD_TEST_WRONG}", "refused user 'baton'"),
            ("guest", SECRET, "permission denied"),
            ("", "", "without user and password"),
        ]:
            refused = session(server, user=user, password=password)
            with pytest.raises(ConfigurationError, match=words):
                refused.ready(5)


def test_a_password_that_changes_is_taken_up_without_anybody_missing(
    session: Session, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("secret")
    with guarded_etcd() as server:
        one = session(server, user="baton", password=f"file:{file}")
        heard = Heard(one)
        one.publish(A)
        one.ready(5)
        with admin(server, user="root", password="secret") as client:
            client.authstub.UserChangePassword(
                pyetcd.etcdrpc.AuthUserChangePasswordRequest(name="baton", password="newer"),
                metadata=client.metadata,
            )
        file.write_text("newer")
        two = session(server, user="baton", password=f"file:{file}")
        two.publish(B)
        two.ready(5)
        assert one.wait_for(B.peer, 10) == B
        time.sleep(TTL_S + TOKEN_TTL_S + 2)
        assert one.healthy
        assert two.wait_for(A.peer, 5) == A
        assert heard.of(A) == [JOINED]
        with pytest.raises(ConfigurationError, match="refused user 'baton'"):
            session(server, user="baton", password=SECRET).ready(5)


def test_a_user_where_etcd_has_none_is_refused(etcd: EtcdServer, session: Session) -> None:
    refused = session(etcd, user="baton", password=SECRET)
    with pytest.raises(ConfigurationError, match="authentication is not enabled"):
        refused.ready(5)


@pytest.fixture
def late_watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first watch of every connection's thread comes when its token has expired."""
    told: list[str] = []
    watch, late = EtcdClient.watch, set[int]()

    def wait_and_watch(self: EtcdClient, prefix: str, revision: int) -> WatchStream:
        if threading.get_ident() not in late:
            late.add(threading.get_ident())
            time.sleep(TOKEN_TTL_S + 1.5)
        told.append(prefix)
        return watch(self, prefix, revision)

    monkeypatch.setattr(EtcdClient, "watch", wait_and_watch)
    return told


@pytest.mark.parametrize("user", ["baton", "root"])
def test_a_token_that_expires_before_the_watch_is_no_refusal(
    user: str, session: Session, late_watch: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with guarded_etcd() as server:
        one = session(server, user=user, password=SECRET)
        one.publish(A)

        def healthy() -> bool:
            one.ready(5)  # at no moment does it tell of a refusal
            return one.healthy

        eventually(healthy)
        assert one.wait_for(A.peer, 5) == A
        assert len(late_watch) == 2, "the token had not expired"
        assert "refused" not in caplog.text


def test_rights_taken_away_are_a_refusal(session: Session) -> None:
    with guarded_etcd() as server:
        one = session(server, user="baton", password=SECRET)
        one.ready(5)
        with admin(server, user="root", password="secret") as client:
            client.authstub.UserRevokeRole(
                pyetcd.etcdrpc.AuthUserRevokeRoleRequest(name="baton", role="workers"),
                metadata=client.metadata,
            )
        one.publish(A)
        with pytest.raises(ConfigurationError, match="permission denied; grant the user read"):
            one.ready(10)
