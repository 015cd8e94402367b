"""The decode side of the connector's scheduler: what it reads, refuses, gives up and renews."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.support.scripted.scheduler_requests import (
    BLOCK,
    HANDSHAKE,
    NOTHING,
    TTL_S,
    Clock,
    adapter,
    blocks_for,
    decode_request,
    fingerprint_in_name,
    make_blocks,
    make_request,
    make_scheduler,
    make_ticket,
    medium,
    schedule,
    tokens,
)
from transfer.connector.metadata import HeldTicket, Verdict, WorkerReport
from transfer.connector.outcomes import ReadOutcome
from transfer.connector.scheduling.ticket_writer import TicketWriter
from transfer.ticket import Medium, prompt_hash

REFUSED = Verdict(ReadOutcome.REFUSED, recomputed_tokens=39)

# ---- what is read ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 3])
def test_whole_prompt_is_read_when_nothing_is_cached_here(length: int) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(length))
    request = decode_request(tokens(length), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (length, True)

    assert scheduler.has_pending
    metadata = scheduler.take_metadata(idle=False)
    (read,) = metadata.reads
    assert read.request_id == "request-1"
    assert read.ticket == ticket
    assert read.num_tokens == length
    assert read.first_token == 0
    assert read.local_block_ids == tuple(range(100, 100 + blocks_for(length)))
    assert metadata == dataclasses.replace(NOTHING, reads=[read])
    assert not scheduler.has_pending


@pytest.mark.parametrize(
    ("length", "local"),
    [
        (BLOCK + 2, BLOCK),
        (2 * BLOCK, BLOCK),
        (3 * BLOCK + 5, BLOCK),
        (3 * BLOCK + 5, 2 * BLOCK),
        (3 * BLOCK + 5, 3 * BLOCK),
    ],
)
def test_blocks_cached_here_are_skipped_on_both_sides(length: int, local: int) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(length), block_ids=tuple(range(50, 50 + blocks_for(length))))
    request = decode_request(tokens(length), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request, local) == (length - local, True)

    (read,) = scheduler.take_metadata(idle=False).reads
    skipped = local // BLOCK
    assert read.first_token == local
    assert read.local_block_ids == tuple(range(100 + skipped, 100 + blocks_for(length)))
    assert read.num_tokens == length - local


@given(st.integers(2, 6 * BLOCK), st.integers(0, 6), st.integers(0, 3))
def test_every_missing_token_is_read_into_its_own_block(
    length: int, local_blocks: int, lookahead: int
) -> None:
    local = min(local_blocks, (length - 1) // BLOCK) * BLOCK
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(length), block_ids=tuple(range(900, 900 + blocks_for(length))))
    request = decode_request(tokens(length), ticket)
    scheduler.on_new_request(request)
    count, _ = scheduler.matched_tokens(request, local)
    assert count is not None
    # vLLM may hand out blocks beyond the prompt (lookahead); they must stay out of it.
    scheduler.after_alloc(request, make_blocks(blocks_for(length) + lookahead), count)

    metadata = scheduler.take_metadata(idle=False)

    if length - local == 1:
        assert not metadata.reads
        return
    (read,) = metadata.reads
    assert (read.first_token, read.num_tokens) == (local, length - local)
    assert read.local_block_ids == tuple(
        100 + block for block in range(local // BLOCK, blocks_for(length))
    )


@pytest.mark.parametrize(
    ("length", "local"), [(1, 0), (BLOCK + 1, BLOCK), (4 * BLOCK + 1, 4 * BLOCK)]
)
def test_last_token_alone_is_computed_and_the_ticket_forfeited(length: int, local: int) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(length))
    request = decode_request(tokens(length), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request, local) == (0, False)

    assert scheduler.has_pending
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, forfeits=[HeldTicket("request-1", ticket)]
    )
    # Forfeited once: the end of the request says nothing more.
    request.status = RequestStatus.FINISHED_STOPPED
    assert scheduler.request_finished(request, [100]) == (False, None)
    assert scheduler.take_metadata(idle=False) == NOTHING


def test_request_that_must_not_read_caches_forfeits_and_recomputes() -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(40))
    request = decode_request(tokens(40), ticket, skip_reading_prefix_cache=True)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)

    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING,
        forfeits=[HeldTicket("request-1", ticket)],
        verdicts=[Verdict(None, recomputed_tokens=39)],
    )


def test_tokens_that_vllm_does_not_take_count_as_recomputed() -> None:
    # vLLM may prefer a local hit and allocate without the remote tokens that it was offered.
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(3 * BLOCK))
    request = decode_request(tokens(3 * BLOCK), ticket)
    scheduler.on_new_request(request)
    assert scheduler.matched_tokens(request, BLOCK) == (2 * BLOCK, True)

    scheduler.after_alloc(request, make_blocks(3), 0)

    metadata = scheduler.take_metadata(idle=False)
    assert metadata.forfeits == [HeldTicket("request-1", ticket)]
    assert metadata.verdicts == [Verdict(None, recomputed_tokens=2 * BLOCK - 1)]
    assert not metadata.reads


def test_asking_again_before_there_are_blocks_changes_nothing() -> None:
    scheduler = make_scheduler("consumer")
    request = decode_request(tokens(3 * BLOCK), make_ticket(tokens(3 * BLOCK)))
    scheduler.on_new_request(request)

    assert scheduler.matched_tokens(request, 0) == (3 * BLOCK, True)
    assert scheduler.matched_tokens(request, BLOCK) == (2 * BLOCK, True)
    assert scheduler.take_metadata(idle=False) == NOTHING
    assert schedule(scheduler, request, 2 * BLOCK) == (BLOCK, True)
    (read,) = scheduler.take_metadata(idle=False).reads
    assert read.first_token == 2 * BLOCK
    assert read.local_block_ids == (102,)


def test_read_is_asked_for_once() -> None:
    scheduler = make_scheduler("consumer")
    request = decode_request(tokens(40), make_ticket(tokens(40)))
    scheduler.on_new_request(request)
    schedule(scheduler, request)
    assert len(scheduler.take_metadata(idle=False).reads) == 1

    assert schedule(scheduler, request) == (0, False)
    assert scheduler.take_metadata(idle=False) == NOTHING


def test_after_the_load_the_request_is_like_any_other() -> None:
    scheduler = make_scheduler("consumer")
    request = decode_request(tokens(40), make_ticket(tokens(40)))
    scheduler.on_new_request(request)
    schedule(scheduler, request)
    scheduler.take_metadata(idle=False)

    scheduler.on_loaded({"request-1"}, WorkerReport({"request-1": ReadOutcome.OK}))

    assert scheduler.has_pending
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, verdicts=[Verdict(ReadOutcome.OK, tokens=40)]
    )
    # vLLM asks again when it resumes the request, and after a load that failed.
    assert schedule(scheduler, request) == (0, False)
    request.status = RequestStatus.FINISHED_STOPPED
    assert scheduler.request_finished(request, [100, 101, 102]) == (False, None)
    assert scheduler.take_metadata(idle=False) == NOTHING


@pytest.mark.parametrize(
    ("ranks", "verdict"),
    [
        ([[ReadOutcome.OK, ReadOutcome.OK]], Verdict(ReadOutcome.OK, tokens=40)),
        ([[ReadOutcome.OK], [ReadOutcome.OK]], Verdict(ReadOutcome.OK, tokens=40)),
        (
            [[ReadOutcome.OK], [ReadOutcome.FAILED]],
            Verdict(ReadOutcome.FAILED, recomputed_tokens=39),
        ),
        (
            [[ReadOutcome.UNPROVEN, ReadOutcome.FAILED]],
            Verdict(ReadOutcome.UNPROVEN, recomputed_tokens=39),
        ),
        (
            [[ReadOutcome.CORRUPTED], [ReadOutcome.OK]],
            Verdict(ReadOutcome.CORRUPTED, recomputed_tokens=39),
        ),
        (
            [[ReadOutcome.FAILED, ReadOutcome.REFUSED]],
            Verdict(ReadOutcome.FAILED, recomputed_tokens=39),
        ),
        ([[ReadOutcome.CANCELLED], [ReadOutcome.OK]], Verdict(ReadOutcome.CANCELLED)),
    ],
)
def test_a_prompt_came_only_if_all_ranks_have_it(
    ranks: list[list[ReadOutcome]], verdict: Verdict
) -> None:
    scheduler = make_scheduler("consumer")
    request = decode_request(tokens(40), make_ticket(tokens(40)))
    scheduler.on_new_request(request)
    schedule(scheduler, request)
    scheduler.take_metadata(idle=False)

    for number, step in enumerate(ranks, 1):
        report = WorkerReport()
        for outcome in step:
            report = report.aggregate(WorkerReport({"request-1": outcome}))
        # vLLM names the request once the last rank has named it.
        scheduler.on_loaded({"request-1"} if number == len(ranks) else set(), report)

    assert scheduler.take_metadata(idle=False).verdicts == [verdict]
    assert not scheduler.has_pending


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}, {"other": 1}])
def test_request_without_ticket_is_left_alone(params: dict[str, Any] | None) -> None:
    scheduler = make_scheduler("consumer")
    request = make_request(tokens(40), params)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    assert scheduler.take_metadata(idle=False) == NOTHING


def test_engine_that_only_prefills_reads_no_tickets() -> None:
    scheduler = make_scheduler("producer")
    request = decode_request(tokens(40), make_ticket(tokens(40)))
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    assert scheduler.take_metadata(idle=False) == NOTHING


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        {"token_ids": tokens(40, start=8)},
        {"token_ids": tokens(39)},
        {"token_ids": tokens(41)},
        {"token_ids": tokens(40), "cache_salt": "mine"},
        {"token_ids": tokens(40), "lora_request": adapter("pirate@hoist")},
        {"token_ids": tokens(40), "lora_request": adapter("pirate")},
        {"token_ids": tokens(40), "mm_features": [medium("cat")]},
        {"token_ids": tokens(40), "prompt_embeds": object()},
    ],
)
def test_ticket_of_another_prompt_is_refused_and_forfeited(prompt: dict[str, Any]) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(40))
    request = decode_request(prompt.pop("token_ids"), ticket, **prompt)

    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING,
        forfeits=[HeldTicket("request-1", ticket)],
        verdicts=[Verdict(ReadOutcome.REFUSED, recomputed_tokens=request.num_prompt_tokens - 1)],
    )


def test_ticket_of_the_same_prompt_with_salt_adapter_and_images_is_taken() -> None:
    scheduler = make_scheduler("consumer")
    digest = prompt_hash(
        tokens(40),
        media=[Medium("cat", 3, 5), Medium("dog", 9, 5)],
        adapter="hoist",
        cache_salt="mine",
    )
    request = decode_request(
        tokens(40),
        make_ticket(tokens(40), prompt_hash=digest),
        cache_salt="mine",
        lora_request=adapter("buccaneer@hoist"),
        mm_features=[medium("cat", 3), medium("dog", 9)],
    )
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (40, True)


@pytest.mark.parametrize("num_tokens", [32, 48])
def test_ticket_that_covers_another_length_is_refused(num_tokens: int) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(
        tokens(40), num_tokens=num_tokens, block_ids=tuple(range(num_tokens // BLOCK))
    )
    request = decode_request(tokens(40), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    (verdict,) = scheduler.take_metadata(idle=False).verdicts
    assert verdict.outcome is ReadOutcome.REFUSED


@pytest.mark.parametrize(("block_size", "local"), [(8, 0), (32, 0), (1024, 2 * BLOCK)])
def test_ticket_in_blocks_of_another_size_is_read_into_ours(block_size: int, local: int) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(
        tokens(40), block_size=block_size, block_ids=tuple(range(-(-40 // block_size)))
    )
    request = decode_request(tokens(40), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request, local) == (40 - local, True)
    (read,) = scheduler.take_metadata(idle=False).reads
    assert (read.first_token, read.num_tokens) == (local, 40 - local)
    assert read.local_block_ids == tuple(range(100 + local // BLOCK, 103))


@pytest.mark.parametrize(("block_size", "local"), [(6, 0), (24, 0), (17, 2 * BLOCK)])
def test_ticket_in_blocks_that_do_not_divide_ours_is_refused_and_forfeited(
    block_size: int, local: int
) -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(
        tokens(40), block_size=block_size, block_ids=tuple(range(-(-40 // block_size)))
    )
    request = decode_request(tokens(40), ticket)
    scheduler.on_new_request(request)

    assert schedule(scheduler, request, local) == (0, False)
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, forfeits=[HeldTicket("request-1", ticket)], verdicts=[REFUSED]
    )


@pytest.mark.parametrize("change", [{"fence": 0}, {"version": 3}, {"secret": None}])
def test_malformed_ticket_is_refused_and_the_prompt_computed(change: dict[str, Any]) -> None:
    scheduler = make_scheduler("consumer")
    request = make_request(tokens(40), {**make_ticket(tokens(40)).to_params(), **change})

    scheduler.on_new_request(request)

    assert schedule(scheduler, request) == (0, False)
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(NOTHING, verdicts=[REFUSED])


@pytest.mark.parametrize("prompt", [[0], tokens(40)])
def test_request_that_the_engine_turned_away_forfeits_its_ticket(prompt: list[int]) -> None:
    # vLLM makes up a request of prompt [0] for it; the ticket may even be of that prompt.
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(prompt)
    request = decode_request([0], ticket, abort_immediately=True)

    scheduler.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(request, []) == (False, None)

    assert scheduler.has_pending
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, forfeits=[HeldTicket("request-1", ticket)]
    )


# ---- what ends early ---------------------------------------------------------------------


@pytest.mark.parametrize("idle", [True, False])
def test_the_workers_hear_whether_there_is_anything_to_compute(idle: bool) -> None:
    scheduler = make_scheduler()
    assert scheduler.take_metadata(idle=idle).idle is idle


def test_abort_before_scheduling_forfeits() -> None:
    scheduler = make_scheduler("both")
    ticket = make_ticket(tokens(40))
    request = decode_request(tokens(40), ticket)
    scheduler.on_new_request(request)
    scheduler.matched_tokens(request, 0)

    request.status = RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(request, []) == (False, None)

    assert scheduler.has_pending
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, forfeits=[HeldTicket("request-1", ticket)]
    )


def test_abort_while_loading_cancels() -> None:
    scheduler = make_scheduler("both")
    request = decode_request(tokens(40), make_ticket(tokens(40)))
    scheduler.on_new_request(request)
    schedule(scheduler, request)
    scheduler.take_metadata(idle=False)

    request.status = RequestStatus.FINISHED_ABORTED
    assert scheduler.request_finished(request, [100, 101, 102]) == (False, None)

    assert scheduler.has_pending
    assert scheduler.take_metadata(idle=False) == dataclasses.replace(
        NOTHING, cancels=["request-1"]
    )
    # The worker still reports the end of the read; by then the request is forgotten.
    scheduler.on_loaded({"request-1"}, WorkerReport({"request-1": ReadOutcome.CANCELLED}))
    assert scheduler.take_metadata(idle=False).verdicts == [Verdict(ReadOutcome.CANCELLED)]
    assert scheduler.take_metadata(idle=False) == NOTHING


# ---- renewals ----------------------------------------------------------------------------


def test_tickets_are_renewed_four_times_in_their_life_until_loaded() -> None:
    clock = Clock()
    scheduler = make_scheduler("consumer", clock)
    waiting = decode_request(tokens(40), make_ticket(tokens(40), "1"), request_id="waiting")
    loading = decode_request(tokens(40), make_ticket(tokens(40), "2"), request_id="loading")
    scheduler.on_new_request(waiting)
    scheduler.on_new_request(loading)
    schedule(scheduler, loading)

    renewed: list[tuple[float, list[str]]] = []
    for step in range(60):
        if step == 31:
            scheduler.on_loaded({"loading"}, None)
        clock.now_s += 0.5
        names = [held.request_id for held in scheduler.take_metadata(idle=False).renewals]
        if names:
            renewed.append(((step + 1) * 0.5, names))

    both, one = ["waiting", "loading"], ["waiting"]
    assert renewed == [(5, both), (10, both), (15, both), (20, one), (25, one), (30, one)]


def test_rare_steps_renew_in_every_step() -> None:
    clock = Clock()
    scheduler = make_scheduler("consumer", clock)
    ticket = make_ticket(tokens(40))
    scheduler.on_new_request(decode_request(tokens(40), ticket))

    for _ in range(3):
        clock.now_s += TTL_S / 2
        assert scheduler.take_metadata(idle=False).renewals == [HeldTicket("request-1", ticket)]


def test_a_time_of_day_that_is_set_back_holds_up_no_renewal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_day, monotonic = Clock(), Clock()
    with monkeypatch.context() as clocks:
        clocks.setattr(time, "time", of_day)
        clocks.setattr(time, "monotonic", monotonic)
        # Which clock it goes by is settled when the module is loaded.
        spec = importlib.util.find_spec("transfer.connector.scheduling.scheduler")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        writer = TicketWriter(
            engine_id="engine-a",
            tp_size=2,
            block_size=BLOCK,
            ttl_s=TTL_S,
            adapter_fingerprint=fingerprint_in_name,
        )
        scheduler = module.BatonScheduler(writer, producer=False, consumer=True)
        scheduler.set_handshake(HANDSHAKE)
        ticket = make_ticket(tokens(40))
        scheduler.on_new_request(decode_request(tokens(40), ticket))
        scheduler.take_metadata(idle=False)

        of_day.now_s -= 3600
        for _ in range(3):
            monotonic.now_s += TTL_S / 4
            renewals = scheduler.take_metadata(idle=False).renewals
            assert renewals == [HeldTicket("request-1", ticket)]


def test_all_readers_of_one_ticket_read_it() -> None:
    scheduler = make_scheduler("consumer")
    ticket = make_ticket(tokens(40), readers=3)
    for sample in range(3):
        request = decode_request(tokens(40), ticket, request_id=f"{sample}_request")
        scheduler.on_new_request(request)
        schedule(scheduler, request)

    reads = scheduler.take_metadata(idle=False).reads

    assert [read.request_id for read in reads] == ["0_request", "1_request", "2_request"]
    assert {read.ticket for read in reads} == {ticket}
