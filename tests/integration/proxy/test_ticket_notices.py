"""Owners of tickets that nobody will read, told of it by a process that has no engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.callers.ticket_notices import TicketNotices
from serve_app.proxy.command import notice_settings
from tests.support.scripted.tickets import make_ticket
from tests.support.servers.certificates import Authority, TlsFiles
from tests.support.transfers.engines import Pair, engine_pair, take_ended
from transfer.discovery.static import StaticDiscovery
from transfer.errors import TlsRefused
from transfer.settings import TransferSettings
from transfer.ticket import Ticket


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    """What the workers have, and a proxy that they let in."""
    return Authority(tmp_path, "workers").issue("worker", "127.0.0.1")


def offered(pair: Pair) -> Ticket:
    """The ticket of a hand-off that the pair's owner offers now."""
    proof = pair.offer()
    return make_ticket(
        engine_id=pair.owner_id.engine_id,
        handoff_id=proof.handoff_id,
        incarnation=proof.incarnation,
        fence=proof.fence,
        secret=proof.secret,
    )


def discovery_of(pair: Pair) -> StaticDiscovery:
    record = pair.directory.lookup(pair.owner_id)
    assert record is not None
    return StaticDiscovery([record])


def has_freed(pair: Pair, ticket: Ticket) -> bool:
    return [one.handoff_id for one in take_ended(pair.owner)] == [ticket.handoff_id]


def test_an_owner_is_told() -> None:
    with (
        engine_pair(settings=TransferSettings(transports=("tcp",))) as pair,
        discovery_of(pair) as discovery,
    ):
        ticket = offered(pair)
        TicketNotices(discovery, notice_settings("", "", "", "")).abort(ticket)
        assert has_freed(pair, ticket)


def test_an_owner_that_talks_by_tls_is_told(tls: TlsFiles) -> None:
    workers = TransferSettings(transports=("tcp",), **tls.settings())
    with engine_pair(settings=workers) as pair, discovery_of(pair) as discovery:
        ticket = offered(pair)
        with pytest.raises(TlsRefused):
            TicketNotices(discovery, notice_settings("", "", "", "")).abort(ticket)

        shown = notice_settings(tls.tls_ca, tls.tls_cert, tls.tls_key, "")
        TicketNotices(discovery, shown).abort(ticket)
        assert has_freed(pair, ticket)
