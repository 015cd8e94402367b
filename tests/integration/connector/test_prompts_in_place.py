"""Prompts from one KV cache into another where the model's work is waited for: real engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.held_event import HeldInPlace
from tests.support.connector.kv_pools import make_pool
from tests.support.connector.staged_memory import BLOCK, MODEL
from tests.support.scripted.scheduler_requests import make_ticket, tokens
from tests.support.scripted.tickets import changed_params
from tests.support.transfers.engines import LAYOUT_HASH, Directory, make_engine
from transfer.connector.metadata import HeldTicket, NewOffer, NewRead
from transfer.connector.outcomes import OfferOutcome, ReadOutcome
from transfer.connector.working.offers import EndedOffer, PromptOffers
from transfer.connector.working.reads import EndedRead, PromptReads
from transfer.errors import ProtocolError
from transfer.ticket import Ticket
from transfer.types import PeerId

Ended = TypeVar("Ended", EndedRead, EndedOffer)

NUM_BLOCKS = 16
COUNT = 5


class Worker:
    """A connector's worker side without vLLM, whose blocks stay where they are."""

    def __init__(self, directory: Directory, name: str, layout_hash: str = LAYOUT_HASH) -> None:
        self.pool = make_pool(
            MODEL, KVCacheLayout.LBNHC, num_blocks=NUM_BLOCKS, kernel_tokens=BLOCK
        )
        self.engine = make_engine(
            directory, name, layout=self.pool.layout.encode(), layout_hash=layout_hash
        )
        storage = self.pool.layers[0].untyped_storage()
        self.engine.register(storage.data_ptr(), storage.nbytes())
        self.path = HeldInPlace(self.pool.layout, self.engine.wake, name)
        self.offers = PromptOffers(self.pool.layout, self.engine, self.path)
        self.reads = PromptReads(
            PeerId(name, 0), self.pool.layout, layout_hash, self.engine, 20.0, self.path
        )
        self.engine.start()

    def close(self) -> None:
        self.path.held.passed.set()
        self.engine.close()
        self.path.close()


@pytest.fixture
def workers() -> Iterator[tuple[Worker, Worker]]:
    directory = Directory()
    owner, reader = Worker(directory, "owner"), Worker(directory, "reader")
    owner.pool.write(range(1, 1 + COUNT), MODEL.values(COUNT * BLOCK))
    yield owner, reader
    reader.close()
    owner.close()
    assert not [thread for thread in threading.enumerate() if "baton-wait" in thread.name]


TICKET = make_ticket(
    tokens(COUNT * BLOCK - 3),
    "1",
    engine_id="owner",
    incarnation="owner-1",
    fence=1,
    tp_size=1,
    layout_hash=LAYOUT_HASH,
    block_ids=tuple(range(1, 1 + COUNT)),
)
OFFER = NewOffer("prefill-1", TICKET, 20.0, TICKET.block_ids)
TARGETS = tuple(range(NUM_BLOCKS - 1, NUM_BLOCKS - 1 - COUNT, -1))
READ = NewRead(
    request_id="decode-1",
    ticket=TICKET,
    local_block_ids=TARGETS,
    places=TARGETS,
    first_token=0,
    num_tokens=TICKET.num_tokens,
)


def ended_reads(worker: Worker) -> list[EndedRead]:
    """As soon as there are some."""
    return polled(worker, worker.reads.take_ended)


def ended_offers(worker: Worker) -> list[EndedOffer]:
    return polled(worker, worker.offers.take_ended)


def polled(worker: Worker, take_ended: Callable[[], list[Ended]]) -> list[Ended]:
    """As an idle engine does it."""
    for _ in range(5000):
        if ended := take_ended():
            return ended
        worker.engine.wait_for_end(0.004)
    return []


def arrived(owner: Worker, reader: Worker) -> bool:
    sent = owner.pool.read(TICKET.block_ids, TICKET.num_tokens)
    return torch.equal(reader.pool.read(TARGETS, TICKET.num_tokens), sent)


def test_a_ticket_with_any_values_ends_in_some_way(workers: tuple[Worker, Worker]) -> None:
    """Nothing that a ticket may hold raises in the model's thread, and no read stays for ever."""
    owner, reader = workers
    for worker in workers:
        worker.path.held.passed.set()
    owner.offers.start(OFFER)

    @settings(deadline=None)
    @given(changed_params(TICKET.to_params()))
    def one(params: dict[str, Any]) -> None:
        try:
            ticket = Ticket.from_params(params)
        except ProtocolError:
            return
        held = HeldTicket("decode-1", ticket)
        reader.reads.renew([held])
        reader.reads.start(replace(READ, ticket=ticket))
        (ended,) = ended_reads(reader)
        assert ended.outcome in (
            ReadOutcome.OK,
            ReadOutcome.REFUSED,
            ReadOutcome.FAILED,
            ReadOutcome.UNPROVEN,
        )
        assert not len(reader.reads)
        reader.reads.forfeit(held)

    one()
    owner.offers.take_ended()
    again = replace(OFFER, ticket=replace(TICKET, handoff_id="2" * 32, fence=2))
    owner.offers.start(again)
    reader.reads.start(replace(READ, ticket=again.ticket))
    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.OK
    assert arrived(owner, reader)


@pytest.mark.parametrize("begun", [True, False])
def test_a_ticket_of_another_layout_is_given_back_at_once(begun: bool) -> None:
    directory = Directory()
    owner, reader = Worker(directory, "owner"), Worker(directory, "reader", "9" * 64)
    owner.path.held.passed.set()
    try:
        owner.offers.start(OFFER)
        if begun:
            reader.reads.start(READ)
            (ended,) = ended_reads(reader)
            assert ended.outcome is ReadOutcome.REFUSED
        else:
            reader.reads.forfeit(HeldTicket("decode-1", TICKET))

        assert ended_offers(owner) == [EndedOffer("prefill-1", OfferOutcome.RELEASED)]
    finally:
        reader.close()
        owner.close()


def test_nothing_is_read_before_the_owners_model_has_written_it(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    reader.path.held.passed.set()
    owner.offers.start(OFFER)
    reader.reads.start(READ)
    assert owner.path.held.waited.wait(5)
    threading.Event().wait(0.1)
    assert reader.reads.take_ended() == []
    assert not arrived(owner, reader)

    owner.path.held.passed.set()

    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.OK
    assert arrived(owner, reader)
    assert ended_offers(owner) == [EndedOffer("prefill-1", OfferOutcome.RELEASED)]


def test_nothing_is_written_before_the_readers_model_is_through(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    before = reader.pool.read(TARGETS, TICKET.num_tokens).clone()
    owner.path.held.passed.set()
    owner.offers.start(OFFER)
    reader.reads.start(READ)
    assert reader.path.held.waited.wait(5)
    threading.Event().wait(0.1)
    assert reader.reads.take_ended() == []
    assert torch.equal(reader.pool.read(TARGETS, TICKET.num_tokens), before)

    reader.path.held.passed.set()

    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.OK
    assert arrived(owner, reader)


def test_an_offer_can_be_given_up_while_it_waits(workers: tuple[Worker, Worker]) -> None:
    owner, reader = workers
    reader.path.held.passed.set()
    owner.offers.start(OFFER)
    assert owner.path.held.waited.wait(5)
    assert owner.offers.abort([TICKET.handoff_id]) == 1
    # Its blocks are not free before the model has written them.
    assert owner.offers.take_ended() == []
    reader.reads.start(READ)
    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.REFUSED

    owner.path.held.passed.set()

    assert ended_offers(owner) == [EndedOffer("prefill-1", OfferOutcome.ABORTED)]


def test_an_owner_that_proves_nothing_is_counted_as_such(workers: tuple[Worker, Worker]) -> None:
    owner, reader = workers
    for worker in workers:
        worker.path.held.passed.set()
    before = reader.pool.read(TARGETS, TICKET.num_tokens).clone()
    owner.offers.start(OFFER)
    reader.reads.start(replace(READ, ticket=replace(TICKET, secret="0" * 32)))
    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.UNPROVEN
    assert torch.equal(reader.pool.read(TARGETS, TICKET.num_tokens), before)


def test_a_read_that_waits_can_be_cancelled(workers: tuple[Worker, Worker]) -> None:
    owner, reader = workers
    owner.path.held.passed.set()
    owner.offers.start(OFFER)
    reader.reads.start(READ)
    assert reader.path.held.waited.wait(5)
    reader.reads.cancel("decode-1")
    (ended,) = ended_reads(reader)
    assert ended.outcome is ReadOutcome.CANCELLED
    reader.path.held.passed.set()
    threading.Event().wait(0.05)
    assert not arrived(owner, reader)
