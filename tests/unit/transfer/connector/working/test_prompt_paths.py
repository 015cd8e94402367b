"""Offers and reads of a worker take the steps of its path in order, whatever the path is."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Pool, make_pool
from tests.support.connector.staged_memory import BLOCK, MODEL
from tests.support.scripted.scheduler_requests import make_ticket, tokens
from tests.support.scripted.worker_parts import ScriptedEngine, ScriptedPath
from transfer.connector.metadata import NewOffer, NewRead
from transfer.connector.outcomes import OfferOutcome, ReadOutcome
from transfer.connector.working.block_path import PromptBlocks
from transfer.connector.working.offers import EndedOffer, PromptOffers
from transfer.connector.working.reads import EndedRead, PromptReads
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import EndedHandoff, HandoffState
from transfer.errors import DigestMismatch, HandoffRefused, Phase
from transfer.types import PeerId, PeerInfo

PROMPT = tokens(2 * BLOCK)
TICKET = make_ticket(PROMPT, tp_size=1, block_ids=(6, 4))
ID = TICKET.handoff_id
OFFER = NewOffer("prefill-1", TICKET, 20.0, (1, 3))
READ = NewRead("decode-1", TICKET, (2, 5), (0, 7), first_token=0, num_tokens=len(PROMPT))
CHANGED = DigestMismatch("changed", phase=Phase.READ)
REFUSED = HandoffRefused("over", phase=Phase.READ)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def path() -> ScriptedPath:
    return ScriptedPath()


@pytest.fixture
def pool() -> Pool:
    return make_pool(MODEL, KVCacheLayout.LBHNC, num_blocks=8, kernel_tokens=BLOCK)


@pytest.fixture
def offers(engine: ScriptedEngine, path: ScriptedPath, pool: Pool) -> PromptOffers:
    return PromptOffers(pool.layout, cast(TransferEngine, engine), path)


def reads_of(
    engine: ScriptedEngine, path: ScriptedPath, pool: Pool, *, digests: bool
) -> PromptReads:
    layout = replace(pool.layout, digest_base=4096, digest_tokens=16) if digests else pool.layout
    peer = PeerId("decode", 0)
    return PromptReads(peer, layout, TICKET.layout_hash, cast(TransferEngine, engine), 1.0, path)


@pytest.fixture
def reads(engine: ScriptedEngine, path: ScriptedPath, pool: Pool) -> PromptReads:
    return reads_of(engine, path, pool, digests=False)


def arrive(engine: ScriptedEngine, pool: Pool, *, digests: bool = False) -> None:
    """All bytes of the read, from an owner like this worker."""
    layout = replace(pool.layout, digest_base=8192, digest_tokens=16) if digests else pool.layout
    engine.planners[-1](
        PeerInfo(PeerId("prefill-a", 0), TICKET.incarnation, TICKET.layout_hash, layout.encode())
    )
    engine.handles[-1].finish(None)


def only(ended: list[EndedRead]) -> ReadOutcome:
    (one,) = ended
    return one.outcome


# ---- offers --------------------------------------------------------------------------------------


def test_readers_are_let_in_when_the_path_says_so(
    engine: ScriptedEngine, path: ScriptedPath, offers: PromptOffers
) -> None:
    offers.start(OFFER)
    (offered,) = engine.offered
    assert not offered.ready
    assert path.blocks == [PromptBlocks((1, 3), (6, 4), range(2 * BLOCK))]
    assert engine.ready == []

    path.then()

    assert engine.ready == [ID]


def test_blocks_are_not_free_before_the_path_is_through_with_them(
    engine: ScriptedEngine, path: ScriptedPath, offers: PromptOffers
) -> None:
    offers.start(OFFER)
    engine.ended = [EndedHandoff(ID, HandoffState.EXPIRED, "nobody came")]
    assert offers.take_ended() == []
    assert offers.num_blocks == 2

    path.future.set_result(None)

    assert offers.take_ended() == [EndedOffer("prefill-1", OfferOutcome.EXPIRED)]
    assert (offers.take_ended(), offers.num_blocks) == ([], 0)


def test_an_offer_that_does_not_get_ready_is_given_up(
    engine: ScriptedEngine,
    path: ScriptedPath,
    offers: PromptOffers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    offers.start(OFFER)
    path.future.set_exception(RuntimeError("the device is lost"))

    assert offers.take_ended() == []

    assert (engine.aborted, engine.ready) == ([ID], [])
    assert "request prefill-1 did not get ready" in caplog.text


# ---- reads ---------------------------------------------------------------------------------------


def test_a_read_takes_the_steps_in_order(
    engine: ScriptedEngine, path: ScriptedPath, pool: Pool, reads: PromptReads
) -> None:
    reads.start(READ)
    assert path.steps == ["mark"]
    assert reads.take_ended() == []

    arrive(engine, pool)
    assert path.steps == ["mark", "before", "after, check=False"]
    assert path.blocks == [PromptBlocks((2, 5), (0, 7), range(2 * BLOCK))]
    assert reads.take_ended() == []

    path.future.set_result(None)
    assert only(reads.take_ended()) is ReadOutcome.OK
    assert path.steps == ["mark", "before", "after, check=False", "finish, check=False"]
    assert (len(reads), engine.released) == (0, [])


def test_digests_are_compared_if_both_sides_have_them(
    engine: ScriptedEngine, path: ScriptedPath, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    reads = reads_of(engine, path, pool, digests=True)
    path.future.set_result(None)
    for digests in (True, False, False):
        path.steps.clear()
        reads.start(READ)
        arrive(engine, pool, digests=digests)
        assert only(reads.take_ended()) is ReadOutcome.OK
        assert path.steps[2:] == [f"after, check={digests}", f"finish, check={digests}"]
        assert ("used unchecked" in caplog.text) is not digests
    assert caplog.text.count("used unchecked") == 1


@pytest.mark.parametrize("early", [True, False])
def test_changed_bytes_are_not_used(
    engine: ScriptedEngine,
    path: ScriptedPath,
    pool: Pool,
    reads: PromptReads,
    caplog: pytest.LogCaptureFixture,
    early: bool,
) -> None:
    if early:
        path.future.set_exception(CHANGED)
    else:
        path.future.set_result(None)
        path.mismatch = CHANGED
    reads.start(READ)
    arrive(engine, pool)

    assert only(reads.take_ended()) is ReadOutcome.CORRUPTED
    assert "request decode-1 arrived changed from engine prefill-a" in caplog.text
    assert ("finish, check=False" in path.steps) is not early


def test_bytes_that_do_not_get_to_the_cache_are_recomputed(
    engine: ScriptedEngine, path: ScriptedPath, pool: Pool, reads: PromptReads
) -> None:
    path.future.set_exception(RuntimeError("the device is lost"))
    reads.start(READ)
    arrive(engine, pool)

    assert only(reads.take_ended()) is ReadOutcome.FAILED


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_read_that_ended_early_does_not_reach_the_cache(
    engine: ScriptedEngine, path: ScriptedPath, reads: PromptReads, cancelled: bool
) -> None:
    reads.start(READ)
    if cancelled:
        reads.cancel("decode-1")
    else:
        engine.handles[-1].finish(REFUSED)

    assert only(reads.take_ended()) is (ReadOutcome.CANCELLED if cancelled else ReadOutcome.REFUSED)
    assert path.steps == ["mark"]
    assert len(engine.released) == cancelled


def test_a_ticket_of_another_layout_is_given_back(
    engine: ScriptedEngine, path: ScriptedPath, reads: PromptReads
) -> None:
    reads.start(replace(READ, ticket=replace(TICKET, layout_hash="9" * 64)))

    assert only(reads.take_ended()) is ReadOutcome.REFUSED
    assert (path.steps, engine.handles) == (["mark"], [])
    assert len(engine.released) == 1
