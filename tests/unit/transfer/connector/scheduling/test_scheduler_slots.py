"""Prompts wait for slots in host memory, and every ending gives theirs back."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.support.scripted.scheduler_requests import (
    BLOCK,
    OFFER,
    TTL_S,
    Clock,
    decode_request,
    make_blocks,
    make_request,
    make_scheduler,
    make_ticket,
    schedule,
    tokens,
)
from transfer.connector.metadata import HeldTicket, WorkerReport
from transfer.connector.outcomes import ReadOutcome
from transfer.connector.scheduling.scheduler import BatonScheduler
from transfer.ticket import Ticket

SLOTS = 4
WAIT = (None, False)


def prefill(scheduler: BatonScheduler, name: str, blocks: int, **fields: Any) -> Any:
    request = make_request(tokens(blocks * BLOCK), OFFER, request_id=name, **fields)
    scheduler.on_new_request(request)
    return request


def decode(scheduler: BatonScheduler, name: str, blocks: int) -> Any:
    prompt = tokens(blocks * BLOCK)
    request = decode_request(prompt, make_ticket(prompt), request_id=name)
    scheduler.on_new_request(request)
    return request


def finish(
    scheduler: BatonScheduler,
    request: Any,
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED,
    block_ids: list[int] | None = None,
) -> Ticket | None:
    request.status = status
    ids = list(range(70, 80)) if block_ids is None else block_ids
    pinned, params = scheduler.request_finished(request, ids)
    assert pinned is (params is not None)
    return None if params is None else Ticket.from_params(params)


# ---- prompts that are offered --------------------------------------------------------------------


def test_readers_are_sent_to_slots() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    schedule(scheduler, prefill(scheduler, "other", 1))
    request = prefill(scheduler, "request-1", 2)
    schedule(scheduler, request)

    ticket = finish(scheduler, request, block_ids=[33, 5, 8])

    assert ticket is not None
    assert ticket.block_ids == (1, 2)
    (offer,) = scheduler.take_metadata(idle=False).offers
    assert (offer.ticket, offer.block_ids) == (ticket, (33, 5))


def test_a_prompt_waits_before_it_is_computed_till_readers_of_others_are_done() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    first = prefill(scheduler, "first", 3)
    second = prefill(scheduler, "second", 2)
    schedule(scheduler, first)
    assert scheduler.matched_tokens(second, 0) == WAIT
    assert finish(scheduler, first) is not None
    assert scheduler.matched_tokens(second, 0) == WAIT

    scheduler.on_sent({"first"})

    assert schedule(scheduler, second) == (0, False)


def test_a_preempted_prompt_keeps_its_slots() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    request = prefill(scheduler, "preempted", 3)
    schedule(scheduler, request)
    assert scheduler.matched_tokens(prefill(scheduler, "other", 3), 0) == WAIT

    assert schedule(scheduler, request) == (0, False)

    ticket = finish(scheduler, request)
    assert ticket is not None
    assert ticket.block_ids == (0, 1, 2)


@pytest.mark.parametrize("asked_first", [True, False])
def test_a_prompt_that_got_no_blocks_yet_holds_no_slots(asked_first: bool) -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    if asked_first:
        assert scheduler.matched_tokens(prefill(scheduler, "no blocks", 4), 0) == (0, False)

    assert schedule(scheduler, prefill(scheduler, "other", 4)) == (0, False)


@pytest.mark.parametrize(
    "status", sorted(item for item in RequestStatus if RequestStatus.is_finished(item))
)
def test_slots_come_back_however_a_prompt_ends(status: RequestStatus) -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    request = prefill(scheduler, "request-1", 4)
    other = prefill(scheduler, "other", 4)
    schedule(scheduler, request)
    assert scheduler.matched_tokens(other, 0) == WAIT

    if finish(scheduler, request, status) is not None:
        assert scheduler.matched_tokens(other, 0) == WAIT
        scheduler.on_sent({"request-1"})

    assert schedule(scheduler, other) == (0, False)


def test_slots_come_back_without_blocks_to_offer() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    request = prefill(scheduler, "request-1", 4)
    schedule(scheduler, request)

    assert finish(scheduler, request, block_ids=[]) is None

    assert schedule(scheduler, prefill(scheduler, "other", 4)) == (0, False)


def test_who_is_aborted_while_waiting_lets_the_next_one_in() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    schedule(scheduler, prefill(scheduler, "running", 2))
    waiting, last = prefill(scheduler, "waiting", 3), prefill(scheduler, "last", 2)
    assert scheduler.matched_tokens(waiting, 0) == WAIT
    assert scheduler.matched_tokens(last, 0) == WAIT

    assert finish(scheduler, waiting, RequestStatus.FINISHED_ABORTED, []) is None

    assert schedule(scheduler, last) == (0, False)


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}])
def test_prompts_that_are_not_offered_need_no_slots(params: dict[str, Any] | None) -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)
    schedule(scheduler, prefill(scheduler, "offered", SLOTS))
    request = make_request(tokens(10 * BLOCK), params, request_id="plain")
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    assert finish(scheduler, request) is None
    # Nor does the end of one whose hand-off is another's harm that one.
    assert scheduler.matched_tokens(prefill(scheduler, "next", 1), 0) == WAIT


def test_a_prompt_that_was_never_scheduled_is_not_offered() -> None:
    scheduler = make_scheduler("producer", num_slots=SLOTS)

    assert finish(scheduler, prefill(scheduler, "request-1", 2)) is None
    assert not scheduler.take_metadata(idle=False).offers


# ---- prompts that are read -----------------------------------------------------------------------


def test_reads_go_into_slots() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    schedule(scheduler, decode(scheduler, "other", 1))
    request = decode(scheduler, "request-1", 3)

    assert schedule(scheduler, request, local_tokens=BLOCK) == (2 * BLOCK, True)

    _, read = scheduler.take_metadata(idle=False).reads
    assert read.local_block_ids == (101, 102)
    assert read.places == (1, 2)


def test_a_read_waits_for_slots_and_its_ticket_is_renewed_meanwhile() -> None:
    clock = Clock()
    scheduler = make_scheduler("consumer", clock, num_slots=SLOTS)
    first, second = decode(scheduler, "first", 3), decode(scheduler, "second", 2)
    schedule(scheduler, first)
    assert scheduler.matched_tokens(second, 0) == WAIT
    assert len(scheduler.take_metadata(idle=False).reads) == 1
    clock.now_s += TTL_S / 2
    renewed = scheduler.take_metadata(idle=True).renewals
    assert [held.request_id for held in renewed] == ["first", "second"]

    scheduler.on_loaded({"first"}, WorkerReport({"first": ReadOutcome.OK}))

    assert schedule(scheduler, second) == (2 * BLOCK, True)


@pytest.mark.parametrize("outcome", [ReadOutcome.OK, ReadOutcome.FAILED, ReadOutcome.CORRUPTED])
def test_slots_come_back_once_all_ranks_are_through(outcome: ReadOutcome) -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    schedule(scheduler, decode(scheduler, "request-1", 4))
    other = decode(scheduler, "other", 4)
    scheduler.on_loaded(set(), WorkerReport({"request-1": outcome}))
    assert scheduler.matched_tokens(other, 0) == WAIT

    scheduler.on_loaded({"request-1"}, WorkerReport({"request-1": outcome}))

    assert schedule(scheduler, other) == (4 * BLOCK, True)


def test_slots_of_a_cancelled_read_stay_till_the_ranks_are_through() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    request, other = decode(scheduler, "request-1", 4), decode(scheduler, "other", 4)
    schedule(scheduler, request)
    assert finish(scheduler, request, RequestStatus.FINISHED_ABORTED) is None
    assert scheduler.matched_tokens(other, 0) == WAIT

    scheduler.on_loaded({"request-1"}, WorkerReport({"request-1": ReadOutcome.CANCELLED}))

    assert schedule(scheduler, other) == (4 * BLOCK, True)


def test_who_waits_for_slots_and_is_aborted_forfeits_and_lets_the_next_one_in() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    schedule(scheduler, decode(scheduler, "running", 2))
    waiting, last = decode(scheduler, "waiting", 3), decode(scheduler, "last", 2)
    assert scheduler.matched_tokens(waiting, 0) == WAIT
    assert scheduler.matched_tokens(last, 0) == WAIT

    assert finish(scheduler, waiting, RequestStatus.FINISHED_ABORTED, []) is None

    forfeits = scheduler.take_metadata(idle=False).forfeits
    assert forfeits == [HeldTicket("waiting", make_ticket(tokens(3 * BLOCK)))]
    assert schedule(scheduler, last) == (2 * BLOCK, True)


def test_a_waiting_prompt_that_is_in_the_local_cache_by_now_needs_no_slots() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    schedule(scheduler, decode(scheduler, "running", SLOTS))
    prompt = tokens(2 * BLOCK + 1)
    request = decode_request(prompt, make_ticket(prompt), request_id="cached")
    scheduler.on_new_request(request)
    assert scheduler.matched_tokens(request, 0) == WAIT

    assert schedule(scheduler, request, local_tokens=2 * BLOCK) == (0, False)

    # It does not stand in anybody's way.
    last = decode(scheduler, "last", 1)
    assert scheduler.matched_tokens(last, 0) == WAIT
    scheduler.on_loaded({"running"}, None)
    assert schedule(scheduler, last) == (BLOCK, True)


def test_tokens_that_vllm_does_not_take_take_no_slots() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    request = decode(scheduler, "request-1", SLOTS)
    assert scheduler.matched_tokens(request, 0) == (SLOTS * BLOCK, True)

    scheduler.after_alloc(request, make_blocks(SLOTS), 0)

    assert schedule(scheduler, decode(scheduler, "other", SLOTS)) == (SLOTS * BLOCK, True)


def test_asking_while_the_read_goes_on_gives_nothing_back() -> None:
    scheduler = make_scheduler("consumer", num_slots=SLOTS)
    request = decode(scheduler, "request-1", SLOTS)
    schedule(scheduler, request)

    assert schedule(scheduler, request) == (0, False)

    assert scheduler.matched_tokens(decode(scheduler, "other", 1), 0) == WAIT


# ---- both ----------------------------------------------------------------------------------------


def test_reads_have_slots_of_their_own() -> None:
    # Otherwise two engines whose offers fill all slots would wait for each other's reads.
    scheduler = make_scheduler("both", num_slots=2 * SLOTS)
    offered = prefill(scheduler, "offered", SLOTS)
    schedule(scheduler, offered)
    assert scheduler.matched_tokens(prefill(scheduler, "waiting", 1), 0) == WAIT

    assert schedule(scheduler, decode(scheduler, "read", SLOTS)) == (SLOTS * BLOCK, True)

    (read,) = scheduler.take_metadata(idle=False).reads
    ticket = finish(scheduler, offered)
    assert ticket is not None
    assert set(ticket.block_ids) | set(read.places) == set(range(2 * SLOTS))


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_ABORTED])
def test_a_prompt_that_is_read_to_be_offered_again_gives_both_back(status: RequestStatus) -> None:
    scheduler = make_scheduler("both", num_slots=2 * SLOTS)
    for name in ("first", "second"):
        prompt = tokens(SLOTS * BLOCK)
        request = decode_request(prompt, make_ticket(prompt), request_id=name)
        request.kv_transfer_params["do_remote_decode"] = True
        scheduler.on_new_request(request)
        assert schedule(scheduler, request) == (SLOTS * BLOCK, True)
        if status is RequestStatus.FINISHED_STOPPED:
            scheduler.on_loaded({name}, None)
            assert finish(scheduler, request, status) is not None
            scheduler.on_sent({name})
        else:
            assert finish(scheduler, request, status) is None
            scheduler.on_loaded({name}, None)
