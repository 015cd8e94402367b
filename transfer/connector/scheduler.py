"""The connector inside vLLM's scheduler: decides what to offer, to read, to give up.

Everything here runs on the scheduler's thread. It holds no connection and touches no memory; it
writes instructions that the worker side carries out (:mod:`transfer.connector.worker`).
"""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from transfer.connector.metadata import (
    BatonMetadata,
    Holding,
    NewOffer,
    NewRead,
    Verdict,
    WorkerHandshake,
    WorkerReport,
)
from transfer.connector.stats import Outcome, worse
from transfer.connector.ticket import (
    MAX_READERS,
    Ticket,
    prompt_hash,
    tickets_from_params,
)
from transfer.errors import ProtocolError

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
        engine_id: of this engine, fresh for every replica.
        block_size: tokens per block.
        ttl_s: how long an offer lives unless renewed, in seconds.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        tp_size: int,
        block_size: int,
        ttl_s: float,
        producer: bool,
        consumer: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine_id = engine_id
        self._tp_size = tp_size
        self._block_size = block_size
        self._ttl_s = ttl_s
        self._producer = producer
        self._consumer = consumer
        self._clock = clock
        self._handshake: WorkerHandshake | None = None
        self._fence = 0
        self._inbound: dict[str, _Inbound] = {}
        # Reads on their way: tokens, and the worst outcome of the ranks that are through.
        self._reading: dict[str, int] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._pending = BatonMetadata()
        self._last_renewal_s = 0.0

    def set_handshake(self, handshake: WorkerHandshake) -> None:
        """The workers are up; from now on tickets can be written."""
        self._handshake = handshake

    # ---- decode side -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Reads the request's ticket, if it brought one."""
        params = request.kv_transfer_params
        if not self._consumer or not params or not params.get("do_remote_prefill"):
            return
        try:
            tickets = tickets_from_params(params)
        except ProtocolError as error:
            logger.warning("ticket of request %s refused: %s", request.request_id, error.message)
            self._refuse(request)
            return
        ticket = self._matching(request, tickets)
        if ticket is not None:
            self._inbound[request.request_id] = _Inbound(ticket)

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many prompt tokens beyond ``num_computed_tokens`` the owner has for us."""
        inbound = self._inbound.get(request.request_id)
        if inbound is None or inbound.loading or request.skip_reading_prefix_cache:
            return 0, False
        inbound.local_tokens = num_computed_tokens
        count = inbound.ticket.num_tokens - num_computed_tokens
        # The last prompt token is always computed here (its logits are needed), so a single
        # missing token is not worth a read.
        return (count, True) if count > 1 else (0, False)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Blocks are there: read into those that the local prefix cache did not have."""
        inbound = self._inbound.get(request.request_id)
        if inbound is None or inbound.loading:
            return
        ticket = inbound.ticket
        if num_external == 0:
            del self._inbound[request.request_id]
            self._pending.forfeits.append(Holding(request.request_id, ticket))
            missing = ticket.num_tokens - inbound.local_tokens
            if missing > 1:
                self._pending.verdicts.append(Verdict(None, recomputed_tokens=missing - 1))
            return
        first_token = ticket.num_tokens - num_external
        first, stop = first_token // self._block_size, self._blocks_of(ticket.num_tokens)
        (local_ids,) = blocks.get_block_ids()
        inbound.loading = True
        self._reading[request.request_id] = num_external
        self._pending.reads.append(
            NewRead(
                request_id=request.request_id,
                ticket=ticket,
                local_block_ids=tuple(local_ids[first:stop]),
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
            tokens = self._reading.pop(request_id, 0)
            outcome = self._outcomes.pop(request_id, Outcome.FAILED)
            if outcome is Outcome.OK:
                verdict = Verdict(outcome, tokens=tokens)
            elif outcome is Outcome.CANCELLED:
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
        inbound = self._inbound.pop(request.request_id, None)
        if inbound is not None:
            if inbound.loading:
                self._pending.cancels.append(request.request_id)
            else:
                self._pending.forfeits.append(Holding(request.request_id, inbound.ticket))
            return False, None
        params = request.kv_transfer_params
        if (
            not self._producer
            or not params
            or not params.get("do_remote_decode")
            or request.status not in _OFFERED_STATES
            or not block_ids
            or self._handshake is None
        ):
            return False, None
        ticket = self._write_ticket(request, block_ids, params, self._handshake)
        self._pending.offers.append(NewOffer(request.request_id, ticket, self._ttl_s))
        return True, ticket.to_params()

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

    def _matching(self, request: Request, tickets: tuple[Ticket, ...]) -> Ticket | None:
        """The ticket of this very prompt; others are refused, for their bytes mean other text."""
        everything = [Holding(request.request_id, ticket) for ticket in tickets]
        if request.abort_immediately:
            # The engine's way to say that it will not run the request that brought them.
            self._pending.forfeits += everything
            return None
        wanted = _prompt_hash(request)
        for ticket in tickets:
            if (ticket.prompt_hash, ticket.num_tokens) == (
                wanted,
                request.num_prompt_tokens,
            ) and self._divides(ticket.block_size):
                return ticket
        if len(tickets) == 1:
            self._pending.forfeits += everything
        logger.warning(
            "request %s brought no ticket of its prompt in blocks of %d tokens, a multiple or an "
            "even part of them",
            request.request_id,
            self._block_size,
        )
        self._refuse(request)
        return None

    def _refuse(self, request: Request) -> None:
        recomputed = max(0, request.num_prompt_tokens - 1)
        self._pending.verdicts.append(Verdict(Outcome.REFUSED, recomputed_tokens=recomputed))

    def _divides(self, block_size: int) -> bool:
        """Whether blocks of that size can become ours."""
        return max(block_size, self._block_size) % min(block_size, self._block_size) == 0

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _write_ticket(
        self,
        request: Request,
        block_ids: list[int],
        params: Mapping[str, Any],
        handshake: WorkerHandshake,
    ) -> Ticket:
        readers = params.get("readers", 1)
        if type(readers) is not int or not 1 <= readers <= MAX_READERS:
            readers = 1
        num_tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        self._fence += 1
        return Ticket(
            handoff_id=uuid.uuid4().hex,
            engine_id=self._engine_id,
            incarnation=handshake.incarnation,
            fence=self._fence,
            token=secrets.token_hex(16),
            request_id=request.request_id,
            block_ids=tuple(block_ids[: self._blocks_of(num_tokens)]),
            num_tokens=num_tokens,
            block_size=self._block_size,
            kv_axes=handshake.kv_axes,
            tp_size=self._tp_size,
            layout_hash=handshake.layout_hash,
            prompt_hash=_prompt_hash(request),
            readers=readers,
            expires_at_s=self._clock() + self._ttl_s,
        )

    def _renew_waiting(self) -> None:
        now = self._clock()
        if now - self._last_renewal_s < self._ttl_s / 4:
            return
        self._last_renewal_s = now
        self._pending.renewals += [
            Holding(request_id, inbound.ticket) for request_id, inbound in self._inbound.items()
        ]


def _prompt_hash(request: Request) -> str:
    return prompt_hash(
        request.prompt_token_ids or [],
        mm_identifiers=[feature.identifier for feature in request.mm_features],
        lora_name=request.lora_request.lora_name if request.lora_request is not None else "",
        cache_salt=request.cache_salt or "",
    )
