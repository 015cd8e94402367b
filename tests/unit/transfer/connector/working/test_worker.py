"""What a worker tells vLLM and counts, with an engine and a path that the test plays."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import make_pool
from tests.support.connector.staged_memory import BLOCK, MODEL
from tests.support.scripted.scheduler_requests import HANDSHAKE, make_ticket, tokens
from tests.support.scripted.worker_parts import ScriptedEngine, ScriptedPath
from transfer.connector.metadata import (
    BatonMetadata,
    HeldTicket,
    NewOffer,
    NewRead,
    Verdict,
    WorkerReport,
)
from transfer.connector.outcomes import ReadOutcome
from transfer.connector.working.offers import PromptOffers
from transfer.connector.working.reads import PromptReads
from transfer.connector.working.worker import BatonWorker
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import EndedHandoff, HandoffState
from transfer.errors import HandoffRefused, PeerUnreachable, Phase, TransferError
from transfer.types import PeerId, PeerInfo

PROMPT = tokens(2 * BLOCK)
TICKET = make_ticket(PROMPT, tp_size=1, block_ids=(6, 4))
OFFER = NewOffer("prefill-1", TICKET, 20.0, (6, 4))
READ = NewRead("decode-1", TICKET, (2, 5), (2, 5), first_token=0, num_tokens=len(PROMPT))


@dataclass
class Side:
    """A worker of the given rank."""

    rank: int = 0
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    path: ScriptedPath = field(default_factory=ScriptedPath)
    closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.path.future.set_result(None)
        self.layout = make_pool(
            MODEL, KVCacheLayout.LBHNC, num_blocks=8, kernel_tokens=BLOCK
        ).layout
        peer, engine = PeerId("engine-a", self.rank), cast(TransferEngine, self.engine)
        self.worker = BatonWorker(
            peer,
            HANDSHAKE,
            engine,
            PromptOffers(self.layout, engine, self.path),
            PromptReads(peer, self.layout, TICKET.layout_hash, engine, 1.0, self.path),
            self.closing,
        )

    def read(self, error: TransferError | None) -> tuple[set[str] | None, set[str] | None]:
        """One read that ends so, and what the worker says when it did."""
        self.worker.carry_out(BatonMetadata(reads=[READ]))
        self.engine.planners[-1](
            PeerInfo(
                PeerId("prefill-a", 0),
                TICKET.incarnation,
                TICKET.layout_hash,
                self.layout.encode(),
            )
        )
        self.engine.handles[-1].finish(error)
        return self.worker.take_finished()


def test_a_worker_without_work_says_nothing() -> None:
    side = Side()
    side.worker.carry_out(BatonMetadata(idle=True))

    assert side.worker.take_finished() == (None, None)
    assert (side.worker.take_failed_blocks(), side.worker.take_report()) == (set(), None)
    assert side.worker.take_stats() is None
    assert side.engine.waits_s == []


@pytest.mark.parametrize("rank", [0, 1])
def test_an_offer_is_pinned_till_it_ends(rank: int) -> None:
    side = Side(rank)
    side.worker.carry_out(BatonMetadata(offers=[OFFER]))
    assert side.worker.status()["pinned_blocks"] == 2
    assert side.worker.take_finished() == (None, None)
    side.engine.ended = [EndedHandoff(TICKET.handoff_id, HandoffState.RELEASED, "all read")]

    assert side.worker.take_finished() == ({"prefill-1"}, None)

    assert side.worker.status()["pinned_blocks"] == 0
    # One rank counts for all.
    counted = side.worker.take_stats()
    if rank:
        assert counted is None
    else:
        assert counted is not None
        assert counted.data["owner"] == {"released": 1}
        assert counted.data["pinned_blocks"] == 0


def test_a_read_that_is_done_is_reported() -> None:
    side = Side(rank=1)

    assert side.read(None) == (None, {"decode-1"})

    assert side.worker.take_failed_blocks() == set()
    assert side.worker.take_report() == WorkerReport({"decode-1": ReadOutcome.OK})
    assert side.worker.take_report() is None
    assert side.worker.status()["reads_by_owner"] == {"prefill-a": 1}
    counted = side.worker.take_stats()
    assert counted is not None
    assert len(counted.data["read_seconds"]) == 1


@pytest.mark.parametrize(
    ("error", "outcome", "failed"),
    [
        (PeerUnreachable("gone", phase=Phase.READ), ReadOutcome.FAILED, {"prefill-a": 1}),
        # No fault of the link to that owner.
        (HandoffRefused("over", phase=Phase.READ), ReadOutcome.REFUSED, {}),
    ],
)
def test_blocks_of_a_read_that_failed_are_worthless(
    error: TransferError, outcome: ReadOutcome, failed: dict[str, int]
) -> None:
    side = Side()

    assert side.read(error) == (None, {"decode-1"})

    assert side.worker.take_failed_blocks() == {2, 5}
    assert side.worker.take_failed_blocks() == set()
    assert side.worker.take_report() == WorkerReport({"decode-1": outcome})
    assert side.worker.status()["failed_by_owner"] == failed
    assert side.worker.take_stats() is None


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_counts_what_became_of_requests(rank: int) -> None:
    side = Side(rank)
    side.worker.carry_out(
        BatonMetadata(
            forfeits=[HeldTicket("decode-1", TICKET)],
            verdicts=[
                Verdict(ReadOutcome.OK, tokens=40),
                Verdict(ReadOutcome.FAILED, recomputed_tokens=39),
                Verdict(None, recomputed_tokens=3),
            ],
        )
    )

    assert len(side.engine.released) == 1
    counted = side.worker.take_stats()
    if rank:
        assert counted is None
    else:
        assert counted is not None
        assert counted.data["reader"] == {"ok": 1, "failed": 1, "forfeited": 1}
        assert (counted.data["tokens"], counted.data["recomputed_tokens"]) == (40, 42)


@pytest.mark.parametrize("idle", [True, False])
def test_only_an_idle_step_waits_for_what_is_under_way(idle: bool) -> None:
    side = Side()
    side.worker.carry_out(BatonMetadata(idle=idle, reads=[READ]))

    side.worker.take_finished()

    assert bool(side.engine.waits_s) is idle


def test_offers_that_nobody_reads_are_given_up() -> None:
    side = Side()
    side.worker.carry_out(BatonMetadata(offers=[OFFER]))

    assert side.worker.abort([TICKET.handoff_id, "f" * 32]) == 1
    assert side.engine.aborted == [TICKET.handoff_id]
    # Word of the router was quicker than that of the offer.
    later = replace(TICKET, handoff_id="f" * 32)
    side.worker.carry_out(BatonMetadata(offers=[replace(OFFER, ticket=later)]))
    assert side.engine.aborted == [TICKET.handoff_id, "f" * 32]


def test_a_worker_gives_back_what_it_has_once() -> None:
    side = Side()
    closed: list[str] = []
    side.closing.callback(closed.append, "engine")

    side.worker.close()
    side.worker.close()

    assert closed == ["engine"]
