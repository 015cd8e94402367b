"""What the scheduler side tells the worker side, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from transfer.connector.outcomes import ReadOutcome, worse
from transfer.ticket import Ticket


@dataclass(frozen=True, slots=True)
class NewOffer:
    """Keep a finished prefill until its readers are done.

    Attributes:
        block_ids: of the KV cache; the ticket says where readers find them: there, or in slots.
    """

    request_id: str
    ticket: Ticket
    ttl_s: float
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewRead:
    """Fetch a prompt's tokens from ``first_token`` on into ``local_block_ids``.

    Attributes:
        places: where the bytes go at first, one for each local block: slots, or those blocks.
        first_token: the first one of a block of ours.
        num_tokens: how many, to the end of what the ticket covers.
    """

    request_id: str
    ticket: Ticket
    local_block_ids: tuple[int, ...]
    places: tuple[int, ...]
    first_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class HeldTicket:
    """A ticket that a request holds but does not read now."""

    request_id: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one request's hand-off, on all ranks together.

    Attributes:
        tokens: prompt tokens that came by it.
        recomputed_tokens: prompt tokens that decode computes although they came with a ticket.
    """

    outcome: ReadOutcome | None
    tokens: int = 0
    recomputed_tokens: int = 0


@dataclass
class BatonMetadata(KVConnectorMetadata):
    """One step's instructions; all lists may be empty.

    Attributes:
        idle: the model has nothing to compute in this step.
        verdicts: for the workers' counters, because vLLM asks those.
    """

    idle: bool = False
    offers: list[NewOffer] = field(default_factory=list)
    reads: list[NewRead] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    forfeits: list[HeldTicket] = field(default_factory=list)
    renewals: list[HeldTicket] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """How reads ended on the ranks that report in one step: request id -> outcome.

    vLLM adds the ranks' reports up before the scheduler side sees them.
    """

    reads: dict[str, ReadOutcome] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Both reports in one; of two outcomes of a read the worse."""
        if not isinstance(other, WorkerReport):
            raise TypeError(f"a report of {type(other).__name__} beside BatonConnector's")
        reads = dict(self.reads)
        for request_id, outcome in other.reads.items():
            reads[request_id] = worse(outcome, reads.get(request_id))
        return WorkerReport(reads)


@dataclass(frozen=True, slots=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """What the scheduler needs to know of its workers to write tickets.

    Attributes:
        num_slots: staging slots in host memory; 0 if blocks go straight to and from the KV
            cache.
    """

    incarnation: str
    layout_hash: str
    kv_axes: str
    num_slots: int = 0
