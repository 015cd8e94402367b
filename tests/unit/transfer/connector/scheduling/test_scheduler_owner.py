"""The prefill side of the connector's scheduler: what it offers, and by which tickets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.scripted.scheduler_requests import (
    BLOCK,
    HANDSHAKE,
    NOTHING,
    OFFER,
    TTL_S,
    Clock,
    adapter,
    blocks_for,
    finish,
    make_early_scheduler,
    make_request,
    make_scheduler,
    medium,
    schedule,
    tokens,
)
from transfer.ticket import MAX_READERS, Medium, Ticket, prompt_hash


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED]
)
def test_finished_prefill_is_offered(status: RequestStatus) -> None:
    clock = Clock()
    scheduler = make_scheduler("producer", clock)

    pinned, params = finish(
        scheduler,
        tokens(40),
        status=status,
        block_ids=[5, 3, 8],
        request_id="prefill-x",
        num_computed_tokens=40,
        cache_salt="mine",
        lora_request=adapter("pirate@hoist"),
        mm_features=[medium("cat", 3, 5)],
    )

    assert pinned
    assert params is not None
    ticket = Ticket.from_params(params)
    assert ticket == dataclasses.replace(
        ticket,
        engine_id="engine-a",
        incarnation=HANDSHAKE.incarnation,
        layout_hash=HANDSHAKE.layout_hash,
        request_id="prefill-x",
        block_ids=(5, 3, 8),
        num_tokens=40,
        block_size=BLOCK,
        kv_axes="BHNC",
        tp_size=2,
        readers=1,
        prompt_hash=prompt_hash(
            tokens(40), media=[Medium("cat", 3, 5)], adapter="hoist", cache_salt="mine"
        ),
        expires_at_s=clock.now_s + TTL_S,
    )
    assert scheduler.has_pending
    (offer,) = scheduler.take_metadata(idle=False).offers
    assert (offer.request_id, offer.ticket, offer.ttl_s) == ("prefill-x", ticket, TTL_S)
    assert not scheduler.has_pending


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_only_blocks_of_the_prompt_are_offered(length: int) -> None:
    # The token that prefill sampled may have begun a block of its own.
    scheduler = make_scheduler("producer")
    _, params = finish(
        scheduler,
        tokens(length),
        block_ids=list(range(blocks_for(length) + 2)),
        num_computed_tokens=length + 1,
    )

    assert params is not None
    ticket = Ticket.from_params(params)
    assert ticket.num_tokens == length
    assert ticket.block_ids == tuple(range(blocks_for(length)))


def test_whoever_asks_for_a_prefill_may_name_the_handoff() -> None:
    scheduler = make_scheduler("producer")

    def named(name: Any) -> str:
        _, params = finish(scheduler, tokens(40), params={**OFFER, "handoff_id": name})
        assert params is not None
        return Ticket.from_params(params).handoff_id

    assert named("ab" * 16) == "ab" * 16
    assert named("cd" * 16) == "cd" * 16
    # Two hand-offs of one name would be the engine's end.
    assert named("ab" * 16) not in ("ab" * 16, "cd" * 16)
    odd: list[Any] = [None, 5, "", "AB" * 16, "ab" * 17, ["ab" * 16], {}]
    for nonsense in odd:
        assert named(nonsense) != nonsense


def test_any_request_id_leaves_a_ticket_that_can_be_read() -> None:
    _, params = finish(
        make_scheduler("producer"),
        tokens(40),
        block_ids=[5, 3, 8],
        request_id="x\n" + "x" * 5000,
        num_computed_tokens=40,
    )

    assert params is not None
    assert Ticket.from_params(params).request_id == "x?" + "x" * 510


def test_tokens_that_were_not_computed_are_not_offered() -> None:
    scheduler = make_scheduler("producer")
    _, params = finish(scheduler, tokens(40), num_computed_tokens=BLOCK)

    assert params is not None
    assert Ticket.from_params(params).block_ids == (0,)
    assert Ticket.from_params(params).num_tokens == BLOCK


@pytest.mark.parametrize(
    "status",
    sorted(
        {item for item in RequestStatus if RequestStatus.is_finished(item)}
        - {RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED}
    ),
)
def test_prefill_that_ended_otherwise_is_not_offered(status: RequestStatus) -> None:
    scheduler = make_scheduler("producer")

    assert finish(scheduler, tokens(40), status=status) == (False, None)
    assert scheduler.take_metadata(idle=False) == NOTHING


@pytest.mark.parametrize(
    "params", [{}, {"do_remote_decode": False}, {"do_remote_prefill": False}, {"readers": 2}]
)
def test_request_that_nobody_will_read_is_not_offered(params: dict[str, Any]) -> None:
    scheduler = make_scheduler("producer")

    assert finish(scheduler, tokens(40), params=params) == (False, None)
    assert scheduler.take_metadata(idle=False) == NOTHING


def test_no_offer_without_blocks() -> None:
    assert finish(make_scheduler("producer"), tokens(40), block_ids=[]) == (False, None)


def test_engine_that_only_decodes_offers_nothing() -> None:
    assert finish(make_scheduler("consumer"), tokens(40)) == (False, None)


def test_no_offer_before_the_workers_are_up() -> None:
    assert finish(make_early_scheduler("producer"), tokens(40)) == (False, None)


@pytest.mark.parametrize(
    ("asked", "readers"),
    [(1, 1), (2, 2), (MAX_READERS, MAX_READERS), (MAX_READERS + 1, 1), (0, 1), (-1, 1), ("4", 1)],
)
def test_readers_are_as_many_as_samples(asked: Any, readers: int) -> None:
    scheduler = make_scheduler("producer")
    _, params = finish(scheduler, tokens(40), params={**OFFER, "readers": asked})

    assert params is not None
    assert Ticket.from_params(params).readers == readers


def test_fences_increase_and_nothing_secret_repeats() -> None:
    scheduler = make_scheduler("producer")
    offered = [finish(scheduler, tokens(40))[1] for _ in range(20)]

    tickets = [Ticket.from_params(params) for params in offered if params is not None]
    fences = [ticket.fence for ticket in tickets]
    assert len(tickets) == 20
    assert fences == sorted(set(fences))
    assert len({ticket.handoff_id for ticket in tickets}) == 20
    assert len({ticket.secret for ticket in tickets}) == 20
    assert [offer.ticket for offer in scheduler.take_metadata(idle=False).offers] == tickets


def test_ticket_goes_from_one_engine_to_the_other() -> None:
    prefill, decode = make_scheduler("producer"), make_scheduler("consumer")
    _, params = finish(prefill, tokens(40), block_ids=[5, 3, 8])
    request = make_request(tokens(40), params)
    decode.on_new_request(request)

    assert schedule(decode, request, BLOCK) == (40 - BLOCK, True)
    (read,) = decode.take_metadata(idle=False).reads
    assert read.ticket.block_ids == (5, 3, 8)
    assert read.first_token == BLOCK
