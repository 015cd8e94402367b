"""What the scheduler side tells the worker side, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from transfer.connector.ticket import Ticket


@dataclass(frozen=True, slots=True)
class NewOffer:
    """Pin ``block_ids`` of a finished prefill until its readers are done."""

    request_id: str
    ticket: Ticket
    ttl_s: float


@dataclass(frozen=True, slots=True)
class NewRead:
    """Fetch the owner's ``remote_block_ids`` into our ``local_block_ids``."""

    request_id: str
    ticket: Ticket
    local_block_ids: tuple[int, ...]
    remote_block_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A ticket that a request holds but does not read now."""

    request_id: str
    ticket: Ticket


@dataclass
class BatonMetadata(KVConnectorMetadata):
    """One step's instructions; all lists may be empty.

    Attributes:
        refused: tickets that the scheduler side turned down.
        recomputed_tokens: prompt tokens that decode computes although they came with a ticket.
    """

    offers: list[NewOffer] = field(default_factory=list)
    reads: list[NewRead] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    forfeits: list[Holding] = field(default_factory=list)
    renewals: list[Holding] = field(default_factory=list)
    refused: int = 0
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """What the scheduler needs to know of its workers to write tickets."""

    incarnation: str
    layout_hash: str
