"""The connector inside a vLLM worker: offers prompts, reads them, and says how that ended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from transfer.connector.metadata import BatonMetadata, WorkerHandshake, WorkerReport
from transfer.connector.outcomes import ReadOutcome
from transfer.connector.stats import TransferStats
from transfer.connector.working.offers import PromptOffers
from transfer.connector.working.reads import PromptReads
from transfer.engine.engine import TransferEngine
from transfer.types import PeerId

_IDLE_WAIT_S = 0.004
"""How long a step without computation waits for something to end.

vLLM steps on while blocks are on their way or pinned, a thousand times a second, and the ranks of
an engine spin between the steps: on cores that the transfer needs too. A request that comes
meanwhile waits as long at most.
"""


class BatonWorker:
    """Worker side of the connector; :func:`~transfer.connector.working.start.start_worker` makes
    one. All methods run on the worker's model thread; bytes move on the transfer engine's own.

    Args:
        peer: this worker.
        handshake: what the scheduler side writes into tickets.
        engine: running.
        offers: of this worker.
        reads: of this worker.
        closing: withdraws this worker, and gives back all that it has.
    """

    def __init__(
        self,
        peer: PeerId,
        handshake: WorkerHandshake,
        engine: TransferEngine,
        offers: PromptOffers,
        reads: PromptReads,
        closing: ExitStack,
    ) -> None:
        self.handshake = handshake
        self._peer = peer
        self._engine = engine
        self._offers = offers
        self._reads = reads
        self._closing = closing
        self._failed_blocks: set[int] = set()
        self._idle = False
        self._report: dict[str, ReadOutcome] = {}
        self._reads_by_owner: Counter[str] = Counter()
        self._failed_by_owner: Counter[str] = Counter()
        self._stats = TransferStats()

    def carry_out(self, metadata: BatonMetadata) -> None:
        """Starts whatever the scheduler side decided in this step. Does not wait."""
        self._idle = metadata.idle
        for offer in metadata.offers:
            self._offers.start(offer)
        if metadata.offers:
            self._count_pinned()
        for read in metadata.reads:
            self._reads.start(read)
        for request_id in metadata.cancels:
            self._reads.cancel(request_id)
        for held in metadata.forfeits:
            self._reads.forfeit(held)
        self._reads.renew(metadata.renewals)
        if not self._counts_requests:
            return
        for _ in metadata.forfeits:
            self._stats.count_read(ReadOutcome.FORFEITED, tokens=0)
        for verdict in metadata.verdicts:
            if verdict.outcome is not None:
                self._stats.count_read(verdict.outcome, tokens=verdict.tokens)
            self._stats.count_recomputed(verdict.recomputed_tokens)

    def take_finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks readers are done with, and requests whose reads ended.

        In a step in which the model had nothing to compute, waits up to 4 ms for the first one.
        """
        if self._idle and (self._offers or self._reads):
            self._engine.wait_for_end(_IDLE_WAIT_S)
        sent, received = set(), set()
        for offer in self._offers.take_ended():
            if self._counts_requests:
                self._stats.count_offer(offer.outcome)
            sent.add(offer.request_id)
        if sent:
            self._count_pinned()
        for ended in self._reads.take_ended():
            outcome, owner = ended.outcome, ended.read.ticket.engine_id
            if outcome is ReadOutcome.OK:
                self._stats.count_bytes(ended.bytes_moved, ended.read_s, ended.total_s)
                self._reads_by_owner[owner] += 1
            elif outcome in (ReadOutcome.FAILED, ReadOutcome.UNPROVEN, ReadOutcome.CORRUPTED):
                self._failed_by_owner[owner] += 1
            if outcome is not ReadOutcome.OK:
                self._failed_blocks.update(ended.read.local_block_ids)
            self._report[ended.read.request_id] = outcome
            received.add(ended.read.request_id)
        return sent or None, received or None

    def take_failed_blocks(self) -> set[int]:
        """Local blocks of reads that failed since the last call; their content is worthless."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> WorkerReport | None:
        """How the reads that ended since the last call ended on this rank."""
        report, self._report = self._report, {}
        return WorkerReport(report) if report else None

    def take_stats(self) -> TransferStats | None:
        """What was counted since the last call, or None if nothing was."""
        self._stats.count_overwritten(self._engine.overwritten)
        return self._stats.take()

    def abort(self, handoff_ids: Sequence[str]) -> int:
        """Ends offers that nobody will read. Returns how many were still pinned."""
        return self._offers.abort(handoff_ids)

    def status(self) -> dict[str, Any]:
        """Totals since start and what is pinned now; plain JSON types."""
        return {
            "engine_id": self._peer.engine_id,
            "rank": self._peer.rank,
            "incarnation": self.handshake.incarnation,
            "pid": os.getpid(),
            "pinned_blocks": self._offers.num_blocks,
            "offers": len(self._offers),
            "loads": len(self._reads),
            "reads_by_owner": dict(self._reads_by_owner),
            "failed_by_owner": dict(self._failed_by_owner),
            "totals": self._stats.totals,
            "healthy": self._engine.healthy,
            "registered": self._engine.registered,
            "overwritten": self._engine.overwritten,
        }

    def close(self) -> None:
        """Withdraws this worker and stops the transfer engine. Safe to call twice."""
        self._closing.close()

    # ------------------------------------------------------------------------------------------

    def _count_pinned(self) -> None:
        if self._counts_requests:
            self._stats.set_pinned_blocks(self._offers.num_blocks)

    @property
    def _counts_requests(self) -> bool:
        """Whether this rank counts what concerns a request as a whole, for all ranks."""
        return self._peer.rank == 0
