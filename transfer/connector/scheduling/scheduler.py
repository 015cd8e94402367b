"""The connector inside vLLM's scheduler: decides what to offer, to read, to give up.

Everything here runs on the scheduler's thread. It holds no connection and touches no memory; it
writes instructions that the worker side carries out (:mod:`transfer.connector.working.worker`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from transfer.connector.memory.slots import SlotPool
from transfer.connector.metadata import (
    BatonMetadata,
    HeldTicket,
    NewOffer,
    NewRead,
    Verdict,
    WorkerHandshake,
    WorkerReport,
)
from transfer.connector.outcomes import ReadOutcome, worse
from transfer.connector.scheduling.block_places import BlockPlaces, NoSlots
from transfer.connector.scheduling.slot_queue import SlotQueue
from transfer.connector.scheduling.ticket_writer import TicketWriter, transfer_params
from transfer.errors import ProtocolError
from transfer.ticket import Ticket

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_OFFERED_STATES = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass(slots=True)
class _Inbound:
    """A decode request's ticket and how far it got."""

    ticket: Ticket
    local_tokens: int = 0
    loading: bool = False


class BatonScheduler:
    """Scheduler side of the connector.

    Args:
        tickets: writes those of this engine.
        producer: offers prompts.
        consumer: reads them.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        tickets: TicketWriter,
        *,
        producer: bool,
        consumer: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tickets = tickets
        self._block_size = tickets.block_size
        self._ttl_s = tickets.ttl_s
        self._producer = producer
        self._consumer = consumer
        self._clock = clock
        self._handshake: WorkerHandshake | None = None
        # Of prompts to be offered and to be read. Apart, because two engines that read from each
        # other would wait for each other otherwise.
        self._offer_places: BlockPlaces = NoSlots()
        self._read_places: BlockPlaces = NoSlots()
        self._inbound: dict[str, _Inbound] = {}
        # Reads on their way: tokens, and the worst outcome of the ranks that are through.
        self._reading: dict[str, int] = {}
        self._outcomes: dict[str, ReadOutcome] = {}
        self._pending = BatonMetadata()
        self._last_renewal_s = 0.0

    def set_handshake(self, handshake: WorkerHandshake) -> None:
        """The workers are up; from now on tickets can be written."""
        self._handshake = handshake
        if not handshake.num_slots:
            return
        size = handshake.num_slots // (self._producer + self._consumer)
        if self._producer:
            self._offer_places = SlotQueue(SlotPool(range(size)))
        if self._consumer:
            first = size if self._producer else 0
            self._read_places = SlotQueue(SlotPool(range(first, first + size)))

    # ---- both sides --------------------------------------------------------------------------

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many prompt tokens beyond ``num_computed_tokens`` the owner has for us.

        None if there are no places for the prompt now: vLLM then asks again in a later step.
        """
        if self._is_wanted(request):
            blocks = self._blocks_of(request.num_prompt_tokens)
            if not self._offer_places.has_room(request.request_id, blocks):
                return None, False
        count = self._readable_tokens(request, num_computed_tokens)
        if not count:
            return 0, False
        first = num_computed_tokens // self._block_size
        blocks = self._blocks_of(num_computed_tokens + count) - first
        if not self._read_places.has_room(request.request_id, blocks):
            return None, False
        return count, True

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Blocks are there: places are taken, and what the owner has is read."""
        if self._is_wanted(request):
            self._offer_places.take(request.request_id, self._blocks_of(request.num_prompt_tokens))
        self._read_or_forfeit(request, blocks, num_external)

    # ---- decode side -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Reads the request's ticket, if it brought one."""
        params = transfer_params(request)
        if not self._consumer or not params.get("do_remote_prefill"):
            return
        try:
            ticket = Ticket.from_params(params)
        except ProtocolError as error:
            # Nobody can be told: what cannot be read names no hand-off.
            logger.warning("ticket of request %s refused: %s", request.request_id, error.message)
            self._refuse(request)
            return
        if request.abort_immediately:
            # The engine's way to say that it will not run the request that brought it.
            self._pending.forfeits.append(HeldTicket(request.request_id, ticket))
        elif self._fits(request, ticket):
            self._inbound[request.request_id] = _Inbound(ticket)
        else:
            self._pending.forfeits.append(HeldTicket(request.request_id, ticket))
            self._refuse(request)

    def _readable_tokens(self, request: Request, num_computed_tokens: int) -> int:
        inbound = self._inbound.get(request.request_id)
        if inbound is None or inbound.loading or request.skip_reading_prefix_cache:
            return 0
        inbound.local_tokens = num_computed_tokens
        count = inbound.ticket.num_tokens - num_computed_tokens
        # The last prompt token is always computed here (its logits are needed), so a single
        # missing token is not worth a read.
        return count if count > 1 else 0

    def _read_or_forfeit(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Reads into those blocks that the local prefix cache did not have."""
        inbound = self._inbound.get(request.request_id)
        if inbound is None or inbound.loading:
            return
        ticket = inbound.ticket
        if num_external == 0:
            del self._inbound[request.request_id]
            self._read_places.give_back(request.request_id)
            self._pending.forfeits.append(HeldTicket(request.request_id, ticket))
            missing = ticket.num_tokens - inbound.local_tokens
            if missing > 1:
                self._pending.verdicts.append(Verdict(None, recomputed_tokens=missing - 1))
            return
        first_token = ticket.num_tokens - num_external
        first, stop = first_token // self._block_size, self._blocks_of(ticket.num_tokens)
        (all_ids,) = blocks.get_block_ids()
        local_ids = tuple(all_ids[first:stop])
        self._read_places.take(request.request_id, len(local_ids))
        inbound.loading = True
        self._reading[request.request_id] = num_external
        self._pending.reads.append(
            NewRead(
                request_id=request.request_id,
                ticket=ticket,
                local_block_ids=local_ids,
                places=self._read_places.places_of(request.request_id, local_ids),
                first_token=first_token,
                num_tokens=num_external,
            )
        )

    def on_loaded(self, request_ids: set[str], report: WorkerReport | None) -> None:
        """All ranks are through with these reads, for better or worse.

        Args:
            report: of the ranks that ended one in this step, perhaps before the others.
        """
        for request_id, outcome in (report.reads if report is not None else {}).items():
            self._outcomes[request_id] = worse(outcome, self._outcomes.get(request_id))
        for request_id in request_ids:
            self._inbound.pop(request_id, None)
            self._read_places.give_back(request_id)
            tokens = self._reading.pop(request_id, 0)
            outcome = self._outcomes.pop(request_id, ReadOutcome.FAILED)
            if outcome is ReadOutcome.OK:
                verdict = Verdict(outcome, tokens=tokens)
            elif outcome is ReadOutcome.CANCELLED:
                verdict = Verdict(outcome)
            else:
                verdict = Verdict(outcome, recomputed_tokens=max(0, tokens - 1))
            self._pending.verdicts.append(verdict)

    # ---- prefill side ------------------------------------------------------------------------

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Offers a finished prefill, or lets go of a ticket that will not be used.

        Returns:
            whether the blocks stay pinned until the worker reports them sent, and the ticket.
        """
        ticket = None if self._drop_inbound(request) else self._offered(request, block_ids)
        if ticket is not None:
            return True, ticket.to_params()
        self._offer_places.give_back(request.request_id)
        return False, None

    def on_sent(self, request_ids: set[str]) -> None:
        """The hand-offs of these prompts are over on all ranks."""
        for request_id in request_ids:
            self._offer_places.give_back(request_id)

    def take_metadata(self, *, idle: bool) -> BatonMetadata:
        """This step's instructions; the list starts anew.

        Args:
            idle: the model has nothing to compute in this step.
        """
        self._renew_waiting()
        metadata, self._pending = self._pending, BatonMetadata()
        metadata.idle = idle
        return metadata

    @property
    def has_pending(self) -> bool:
        """Whether a step is needed to hand instructions to the worker side."""
        pending = self._pending
        return bool(
            pending.offers
            or pending.cancels
            or pending.forfeits
            or pending.reads
            or pending.verdicts
        )

    # ------------------------------------------------------------------------------------------

    def _fits(self, request: Request, ticket: Ticket) -> bool:
        """Whether the ticket is of this very prompt; another's bytes mean other text."""
        if (ticket.prompt_hash, ticket.num_tokens) != (
            self._tickets.prompt_hash_of(request),
            request.num_prompt_tokens,
        ):
            logger.warning("request %s brought a ticket of another prompt", request.request_id)
            return False
        if not self._divides(ticket.block_size):
            logger.warning(
                "request %s brought a ticket in blocks of %d tokens, which is no multiple and no "
                "even part of %d",
                request.request_id,
                ticket.block_size,
                self._block_size,
            )
            return False
        return True

    def _refuse(self, request: Request) -> None:
        recomputed = max(0, request.num_prompt_tokens - 1)
        self._pending.verdicts.append(Verdict(ReadOutcome.REFUSED, recomputed_tokens=recomputed))

    def _divides(self, block_size: int) -> bool:
        """Whether blocks of that size can become ours."""
        return max(block_size, self._block_size) % min(block_size, self._block_size) == 0

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _drop_inbound(self, request: Request) -> bool:
        """Lets go of a finished request's ticket; whether it had one that is not read yet."""
        inbound = self._inbound.pop(request.request_id, None)
        if inbound is None:
            return False
        if inbound.loading:
            # The workers still report the end of the read.
            self._pending.cancels.append(request.request_id)
            return True
        self._read_places.give_back(request.request_id)
        self._pending.forfeits.append(HeldTicket(request.request_id, inbound.ticket))
        return True

    def _is_wanted(self, request: Request) -> bool:
        """Whether the request's prompt is to be offered."""
        return self._producer and bool(transfer_params(request).get("do_remote_decode"))

    def _offered(self, request: Request, block_ids: list[int]) -> Ticket | None:
        """The ticket of a finished request's prompt, if it is to be offered and can be."""
        if (
            not self._is_wanted(request)
            or request.status not in _OFFERED_STATES
            or not block_ids
            or self._handshake is None
        ):
            return None
        num_tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        own = tuple(block_ids[: self._blocks_of(num_tokens)])
        places = self._offer_places.places_of(request.request_id, own)
        if len(places) < len(own):
            return None
        ticket = self._tickets.write(request, num_tokens, places, self._handshake)
        if ticket is None:
            return None
        self._pending.offers.append(NewOffer(request.request_id, ticket, self._ttl_s, own))
        return ticket

    def _renew_waiting(self) -> None:
        now = self._clock()
        if now - self._last_renewal_s < self._ttl_s / 4:
            return
        self._last_renewal_s = now
        self._pending.renewals += [
            HeldTicket(request_id, inbound.ticket) for request_id, inbound in self._inbound.items()
        ]
