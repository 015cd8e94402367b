"""Bad links between an owner and a reader that discovery goes on showing to each other."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.network.link_relays import Link, Relays
from tests.support.processes.waiting import wait_until
from tests.support.transfers.engines import (
    Pair,
    engine_pair,
    fails,
    live_offers,
    succeeds,
    take_ended,
)
from transfer.engine.handle import TransferState
from transfer.engine.handoff import HandoffState
from transfer.errors import DeadlineExceeded, PeerUnreachable
from transfer.settings import TransferSettings

MEGABYTE = 1_000_000
NUM_BLOCKS = 256
BLOCK_BYTES = 64 << 10
DEADLINE_S = 2.0


@pytest.fixture
def relays() -> Iterator[Relays]:
    with Relays() as running:
        yield running


@pytest.fixture
def pair(relays: Relays) -> Iterator[Pair]:
    """16 MiB to read, through a relay."""
    settings = TransferSettings(transports=("tcp",), connect_timeout_s=1.0, stall_timeout_s=1.0)
    with engine_pair(NUM_BLOCKS, BLOCK_BYTES, settings=settings) as made:
        (address,) = made.owner.addresses
        made.directory.move(made.owner_id, relays.instead_of(address))
        yield made


def _free_after(pair: Pair, state: HandoffState) -> None:
    (ended,) = take_ended(pair.owner)
    assert ended.state is state
    assert live_offers(pair.owner) == []


def test_a_link_of_1_megabyte_a_second_is_a_deadline_and_not_a_hang(
    pair: Pair, relays: Relays
) -> None:
    """16 s of bytes, 2 s of time: the read fails on time, with bytes having come all along."""
    proof = pair.offer()
    relays.set(Link.OPEN, bytes_per_s=MEGABYTE)
    began_s = time.monotonic()
    handle = pair.read(proof, deadline_s=DEADLINE_S)
    fails(handle, DeadlineExceeded, "not done within")
    assert time.monotonic() - began_s < DEADLINE_S + 1.0
    assert 0 < handle.bytes_moved < NUM_BLOCKS * BLOCK_BYTES
    relays.set(Link.OPEN)
    pair.reader.submit_release(pair.owner_id, proof, used=False)
    _free_after(pair, HandoffState.RELEASED)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()


def test_a_partition_in_the_middle_of_a_read(pair: Pair, relays: Relays) -> None:
    proof = pair.offer()
    relays.set(Link.OPEN, bytes_per_s=4 * MEGABYTE)
    handle = pair.read(proof, deadline_s=DEADLINE_S)
    assert wait_until(lambda: handle.bytes_moved > MEGABYTE)
    relays.set(Link.SILENT)
    fails(handle, DeadlineExceeded)
    relays.set(Link.OPEN)
    pair.reader.submit_release(pair.owner_id, proof, used=False)
    _free_after(pair, HandoffState.RELEASED)
    succeeds(pair.read(pair.offer()))


def test_a_partition_before_a_read(pair: Pair, relays: Relays) -> None:
    succeeds(pair.read(pair.offer()))
    relays.set(Link.SILENT)
    began_s = time.monotonic()
    fails(pair.read(pair.offer(ttl_s=3.0), deadline_s=DEADLINE_S), DeadlineExceeded)
    assert time.monotonic() - began_s < DEADLINE_S + 1.0
    relays.set(Link.OPEN)
    assert wait_until(lambda: live_offers(pair.owner) == [], 6.0), "the offer did not expire"
    succeeds(pair.read(pair.offer()))


def test_a_link_that_refuses_connections(pair: Pair, relays: Relays) -> None:
    relays.set(Link.REFUSED)
    fails(pair.read(pair.offer(), deadline_s=DEADLINE_S), PeerUnreachable)
    relays.set(Link.OPEN)
    handle = pair.read(pair.offer())
    succeeds(handle)
    assert handle.state is TransferState.DONE
