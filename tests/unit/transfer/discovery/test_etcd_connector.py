"""A connection that is closed by another thread while it is being made."""

from __future__ import annotations

from typing import Any

import pytest

from transfer.discovery import etcd_connector
from transfer.discovery.etcd_connector import EtcdConnector
from transfer.discovery.settings import EtcdSettings


class ClosedAtOnce(EtcdConnector):
    """Forgets each connection as soon as it is there, as a close by another thread has it."""

    @property
    def _client(self) -> None:
        return None

    @_client.setter
    def _client(self, client: object) -> None:
        pass


def test_who_asks_for_a_connection_gets_one_though_it_is_closed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    def make(*_: object) -> object:
        made.append(object())
        return made[-1]

    monkeypatch.setattr(etcd_connector, "EtcdClient", make)
    connector = ClosedAtOnce(EtcdSettings("127.0.0.1:2379"), 1.0)
    client: Any = connector.client()
    assert [client] == made
