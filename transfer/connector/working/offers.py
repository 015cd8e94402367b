"""What one prefill rank offers: finished prompts, whose blocks stay till readers are done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from transfer.connector.kv.layout import KVLayout
from transfer.connector.kv.pairing import block_spans_of
from transfer.connector.metadata import NewOffer
from transfer.connector.outcomes import OfferOutcome
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import EndedHandoff, HandoffState, Offer

logger = logging.getLogger(__name__)

_REMEMBERED_ABORTS = 4096
"""Those that came before the offer, or after its end."""

_OUTCOMES = {
    HandoffState.RELEASED: OfferOutcome.RELEASED,
    HandoffState.ABORTED: OfferOutcome.ABORTED,
    HandoffState.EXPIRED: OfferOutcome.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class EndedOffer:
    """A prompt whose blocks may be freed, as far as this rank is concerned."""

    request_id: str
    outcome: OfferOutcome


class PromptOffers:
    """Owner side of one worker. All methods run on the model thread; none waits.

    Args:
        layout: of the memory that readers read.
        engine: running.
        path: the way to that memory.
    """

    def __init__(self, layout: KVLayout, engine: TransferEngine, path: BlockPath) -> None:
        self._layout = layout
        self._engine = engine
        self._path = path
        self._pinned: dict[str, NewOffer] = {}
        # Those of the path that are not over, and hand-offs that ended before theirs was.
        self._saves: dict[str, Future[None]] = {}
        self._ended_early: list[EndedHandoff] = []
        self._aborted: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._pinned)

    @property
    def num_blocks(self) -> int:
        """Blocks that are pinned."""
        return sum(len(offer.ticket.block_ids) for offer in self._pinned.values())

    def start(self, offer: NewOffer) -> None:
        """Lets readers with the ticket read its blocks, as soon as they are ready."""
        ticket = offer.ticket
        self._pinned[ticket.handoff_id] = offer
        self._engine.offer(
            Offer(
                handoff_id=ticket.handoff_id,
                fence=ticket.fence,
                secret=ticket.secret,
                grant=block_spans_of(self._layout, ticket.block_ids),
                readers=ticket.readers,
                ttl_s=offer.ttl_s,
                ready=False,
            )
        )
        self._saves[ticket.handoff_id] = self._path.save(
            PromptBlocks(offer.block_ids, ticket.block_ids, range(ticket.num_tokens)),
            then=partial(self._engine.make_ready, ticket.handoff_id),
        )
        if ticket.handoff_id in self._aborted:
            self.abort([ticket.handoff_id])

    def abort(self, handoff_ids: Sequence[str]) -> int:
        """Ends offers that nobody will read, those that are yet to come too.

        Returns:
            how many were pinned.
        """
        known = [handoff_id for handoff_id in handoff_ids if handoff_id in self._pinned]
        # Word of the router may be quicker than the scheduler's of the offer.
        for handoff_id in handoff_ids:
            if handoff_id not in self._pinned:
                self._aborted[handoff_id] = None
        while len(self._aborted) > _REMEMBERED_ABORTS:
            del self._aborted[next(iter(self._aborted))]
        for handoff_id in known:
            self._engine.abort(handoff_id, "the router gave it up")
        return len(known)

    def take_ended(self) -> list[EndedOffer]:
        """Offers that ended since the last call, each exactly once."""
        self._look_after_saves()
        free = []
        ended_now = self._ended_early + self._engine.take_ended()
        self._ended_early = []
        for ended in ended_now:
            if ended.handoff_id in self._saves:
                self._ended_early.append(ended)
                continue
            offer = self._pinned.pop(ended.handoff_id, None)
            if offer is None:
                continue
            if ended.state is not HandoffState.RELEASED:
                logger.info("hand-off %s %s: %s", ended.handoff_id, ended.state.value, ended.reason)
            free.append(EndedOffer(offer.request_id, _OUTCOMES[ended.state]))
        return free

    def _look_after_saves(self) -> None:
        for handoff_id, save in list(self._saves.items()):
            if not save.done():
                continue
            del self._saves[handoff_id]
            if (error := save.exception()) is not None:
                logger.error(
                    "blocks of request %s did not get ready, nobody can read them: %s",
                    self._pinned[handoff_id].request_id,
                    error,
                )
                self._engine.abort(handoff_id, "its blocks did not get ready")
