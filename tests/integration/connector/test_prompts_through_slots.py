"""Prompts from one KV cache into another through slots on both sides: real transfer engines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tests.support.connector.staged_memory import BLOCK, MODEL, StagedMemory
from tests.support.processes.waiting import wait_until
from tests.support.scripted.scheduler_requests import make_ticket, tokens
from tests.support.transfers.engines import LAYOUT_HASH, Directory, live_offers, make_engine
from transfer.connector.metadata import HeldTicket, NewOffer, NewRead
from transfer.connector.outcomes import OfferOutcome, ReadOutcome
from transfer.connector.working.block_path import PromptBlocks
from transfer.connector.working.offers import EndedOffer, PromptOffers
from transfer.connector.working.reads import EndedRead, PromptReads
from transfer.connector.working.staged import STEP_BLOCKS, Staged
from transfer.ticket import Ticket
from transfer.types import PeerId

NUM_BLOCKS, NUM_SLOTS = 3 * STEP_BLOCKS, 2 * STEP_BLOCKS


class Worker(StagedMemory):
    """A connector's worker side without vLLM."""

    def __init__(self, directory: Directory, name: str) -> None:
        super().__init__(NUM_BLOCKS, NUM_SLOTS)
        self.engine = make_engine(directory, name, layout=self.layout.encode())
        for tensor in self.blocks.tensors:
            self.engine.register(tensor.data_ptr(), tensor.nbytes)
        self.engine.register(*self.digests.memory)
        self.path = Staged(self.blocks, self.layout, self.digests, name, self.engine.wake)
        self.offers = PromptOffers(self.layout, self.engine, self.path)
        self.reads = PromptReads(
            PeerId(name, 0), self.layout, LAYOUT_HASH, self.engine, 20.0, self.path
        )
        self.engine.start()

    def close(self) -> None:
        self.blocks.go.set()
        self.engine.close()
        self.path.close()

    def ended_offers(self, timeout_s: float = 5.0) -> list[EndedOffer]:
        """As soon as there are some, polled as an idle engine does it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if ended := self.offers.take_ended():
                return ended
            self.engine.wait_for_end(0.004)
        return []

    def ended_reads(self, timeout_s: float = 5.0) -> list[EndedRead]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if ended := self.reads.take_ended():
                return ended
            self.engine.wait_for_end(0.004)
        return []


@pytest.fixture
def workers() -> Iterator[tuple[Worker, Worker]]:
    directory = Directory()
    owner, reader = Worker(directory, "owner"), Worker(directory, "reader")
    yield owner, reader
    reader.close()
    owner.close()
    assert not [thread for thread in threading.enumerate() if "baton-copy" in thread.name]


def ticket_of(blocks: int, handoff: str = "1") -> Ticket:
    """In slots that lie scattered, and with a last block that is not full."""
    return make_ticket(
        tokens(blocks * BLOCK - 3),
        handoff,
        engine_id="owner",
        incarnation="owner-1",
        fence=int(handoff, 16),
        tp_size=1,
        layout_hash=LAYOUT_HASH,
        block_ids=tuple(range(1, 2 * blocks, 2)) if blocks <= STEP_BLOCKS else tuple(range(blocks)),
    )


def offer_of(ticket: Ticket) -> NewOffer:
    first = NUM_BLOCKS - len(ticket.block_ids)
    return NewOffer("prefill-1", ticket, 20.0, tuple(range(first, NUM_BLOCKS)))


def read_of(ticket: Ticket, skip: int = 0) -> NewRead:
    count = len(ticket.block_ids) - skip
    return NewRead(
        request_id="decode-1",
        ticket=ticket,
        local_block_ids=tuple(range(count, 0, -1)),
        places=tuple(range(NUM_SLOTS - count, NUM_SLOTS)),
        first_token=skip * BLOCK,
        num_tokens=ticket.num_tokens - skip * BLOCK,
    )


def arrived(owner: Worker, reader: Worker, offer: NewOffer, read: NewRead) -> bool:
    skipped = read.first_token // BLOCK
    sent = owner.pool.read(offer.block_ids[skipped:], read.num_tokens)
    return torch.equal(reader.pool.read(read.local_block_ids, read.num_tokens), sent)


def write(owner: Worker, offer: NewOffer) -> None:
    owner.pool.write(offer.block_ids, MODEL.values(len(offer.block_ids) * BLOCK))


@pytest.mark.parametrize(("blocks", "skip"), [(1, 0), (2, 1), (5, 0), (5, 2), (2 * STEP_BLOCKS, 0)])
def test_a_prompt_crosses(
    workers: tuple[Worker, Worker], blocks: int, skip: int, caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = workers
    ticket = ticket_of(blocks)
    offer, read = offer_of(ticket), read_of(ticket, skip)
    write(owner, offer)

    owner.offers.start(offer)
    reader.reads.start(read)

    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.OK
    assert "used unchecked" not in caplog.text
    assert arrived(owner, reader, offer, read)
    assert owner.ended_offers() == [EndedOffer("prefill-1", OfferOutcome.RELEASED)]


@pytest.mark.parametrize("blocks", [1, STEP_BLOCKS])
def test_a_reader_waits_till_the_copy_is_over(workers: tuple[Worker, Worker], blocks: int) -> None:
    owner, reader = workers
    ticket = ticket_of(blocks)
    offer, read = offer_of(ticket), read_of(ticket)
    write(owner, offer)
    owner.blocks.hold()
    owner.offers.start(offer)
    reader.reads.start(read)
    assert owner.blocks.began.wait(5)
    assert reader.ended_reads(timeout_s=0.1) == []

    owner.blocks.go.set()

    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.OK
    assert arrived(owner, reader, offer, read)


def test_later_offers_that_are_ready_sooner_refuse_no_earlier_reader(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    owner.blocks.hold()
    long, short = ticket_of(STEP_BLOCKS + 4, "1"), ticket_of(1, "2")
    owner.offers.start(offer_of(long))
    owner.offers.start(offer_of(short))
    read = read_of(long)
    reader.reads.start(read)
    assert reader.ended_reads(timeout_s=0.1) == []

    owner.blocks.go.set()

    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.OK


def give_up(owner: Worker, reader: Worker, ticket: Ticket, how: str) -> OfferOutcome:
    if how == "abort":
        assert owner.offers.abort([ticket.handoff_id]) == 1
        return OfferOutcome.ABORTED
    reader.reads.forfeit(HeldTicket("decode-1", ticket))
    return OfferOutcome.RELEASED


@pytest.mark.parametrize("how", ["abort", "forfeit"])
def test_slots_of_an_offer_that_is_given_up_stay_till_the_copy_is_over(
    workers: tuple[Worker, Worker], how: str
) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    owner.blocks.hold()
    owner.offers.start(offer_of(ticket))
    assert owner.blocks.began.wait(5)
    outcome = give_up(owner, reader, ticket, how)
    assert wait_until(lambda: not live_offers(owner.engine))
    assert owner.ended_offers(timeout_s=0.1) == []
    assert owner.offers.num_blocks == 3

    owner.blocks.go.set()

    assert owner.ended_offers() == [EndedOffer("prefill-1", outcome)]
    assert (len(owner.offers), owner.offers.num_blocks) == (0, 0)


def test_an_abort_before_the_offer_ends_it(workers: tuple[Worker, Worker]) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    assert owner.offers.abort([ticket.handoff_id]) == 0

    owner.offers.start(offer_of(ticket))
    reader.reads.start(read_of(ticket))

    assert owner.ended_offers() == [EndedOffer("prefill-1", OfferOutcome.ABORTED)]
    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.REFUSED


def test_a_copy_that_fails_ends_the_offer(
    workers: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    owner.blocks.error = RuntimeError("the device is lost")
    with caplog.at_level(logging.ERROR):
        owner.offers.start(offer_of(ticket))
        assert owner.ended_offers() == [EndedOffer("prefill-1", OfferOutcome.ABORTED)]
    reader.reads.start(read_of(ticket))

    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.REFUSED
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("blocks of request prefill-1 did not get ready")
    assert said.endswith("the device is lost")


def test_a_copy_that_fails_on_arrival_fails_the_read(
    workers: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    reader.blocks.error = RuntimeError("the device is lost")
    owner.offers.start(offer_of(ticket))
    reader.reads.start(read_of(ticket))

    (ended,) = reader.ended_reads()

    assert ended.outcome is ReadOutcome.FAILED
    assert "request decode-1 failed, recomputing: the device is lost" in caplog.text
    assert owner.ended_offers() == [EndedOffer("prefill-1", OfferOutcome.RELEASED)]


def test_blocks_that_arrive_changed_never_reach_the_kv_cache(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    before = reader.pool.copy()
    owner.offers.start(offer_of(ticket))
    assert wait_until(lambda: bool(owner.blocks.tensors[1][ticket.block_ids[2]].any()))
    one = PromptBlocks([0], [0], range(BLOCK))
    assert owner.path.save(one, then=lambda: None).exception(5) is None
    owner.blocks.tensors[1][ticket.block_ids[2], 0, 4, 5] ^= 64

    reader.reads.start(read_of(ticket))

    (ended,) = reader.ended_reads()
    assert ended.outcome is ReadOutcome.CORRUPTED
    for tensor, then in zip(reader.pool.layers, before, strict=True):
        assert torch.equal(tensor, then)


def test_a_cancelled_read_ends_when_nothing_writes_to_its_blocks_any_more(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    ticket = ticket_of(3)
    reader.blocks.hold()
    owner.offers.start(offer_of(ticket))
    reader.reads.start(read_of(ticket))
    assert reader.blocks.began.wait(5)
    reader.reads.cancel("decode-1")
    assert reader.ended_reads(timeout_s=0.1) == []

    reader.blocks.go.set()

    assert len(reader.ended_reads()) == 1


def test_who_polls_is_woken_by_the_end_of_a_copy(workers: tuple[Worker, Worker]) -> None:
    owner, _ = workers
    owner.blocks.hold()
    owner.offers.start(offer_of(ticket_of(1)))
    assert not owner.engine.wait_for_end(0.05)

    threading.Timer(0.05, owner.blocks.go.set).start()

    assert owner.engine.wait_for_end(5)


def test_closing_during_copies_leaves_nothing_running(workers: tuple[Worker, Worker]) -> None:
    owner, reader = workers
    reader.blocks.hold()
    tickets = [ticket_of(4, str(number)) for number in (1, 2)]
    for ticket in tickets:
        owner.offers.start(offer_of(ticket))
    reader.reads.start(read_of(tickets[0]))
    assert reader.blocks.began.wait(5)
    owner.blocks.hold()
    owner.offers.start(offer_of(ticket_of(STEP_BLOCKS + 2, "3")))
    assert owner.blocks.began.wait(5)
    # The fixture closes both, and looks for threads.
