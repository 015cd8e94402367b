"""The connector's scheduler side and the requests that vLLM's scheduler would show it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from vllm.v1.request import RequestStatus

from transfer.connector.metadata import BatonMetadata, WorkerHandshake
from transfer.connector.scheduling.scheduler import BatonScheduler
from transfer.connector.scheduling.ticket_writer import TicketWriter
from transfer.ticket import Ticket, prompt_hash

BLOCK = 16
TTL_S = 20.0
HANDSHAKE = WorkerHandshake(incarnation="d" * 32, layout_hash="e" * 64, kv_axes="BHNC")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


def fingerprint_in_name(adapter: Any) -> str | None:
    """Stands in for the one made of an adapter's files: ``pirate@weights`` has ``weights``."""
    return str(adapter.lora_name).partition("@")[2] or None


def adapter(name: str) -> Any:
    """Stands in for vLLM's LoRARequest."""
    return SimpleNamespace(lora_name=name)


def medium(identifier: str, first_token: int = 3, num_tokens: int = 5) -> Any:
    """Stands in for vLLM's MultiModalFeatureSpec."""
    position = SimpleNamespace(offset=first_token, length=num_tokens)
    return SimpleNamespace(identifier=identifier, mm_position=position)


def make_early_scheduler(role: str = "both", clock: Clock | None = None) -> BatonScheduler:
    """One of engine ``engine-a``, whose workers are not up yet."""
    clock = clock or Clock()
    return BatonScheduler(
        TicketWriter(
            engine_id="engine-a",
            tp_size=2,
            block_size=BLOCK,
            ttl_s=TTL_S,
            adapter_fingerprint=fingerprint_in_name,
            clock=clock,
        ),
        producer=role in ("producer", "both"),
        consumer=role in ("consumer", "both"),
        clock=clock,
    )


def make_scheduler(
    role: str = "both", clock: Clock | None = None, num_slots: int = 0
) -> BatonScheduler:
    """One of engine ``engine-a``, whose workers are up."""
    scheduler = make_early_scheduler(role, clock)
    scheduler.set_handshake(dataclasses.replace(HANDSHAKE, num_slots=num_slots))
    # The engine has made a step already; its first one renews whatever is there.
    scheduler.take_metadata(idle=False)
    return scheduler


def make_request(token_ids: list[int], params: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Stands in for vLLM's Request: the fields that the scheduler side reads."""
    return SimpleNamespace(
        **{
            "request_id": "request-1",
            "prompt_token_ids": token_ids,
            "num_prompt_tokens": len(token_ids),
            "num_computed_tokens": len(token_ids),
            "mm_features": [],
            "prompt_embeds": None,
            "lora_request": None,
            "cache_salt": None,
            "skip_reading_prefix_cache": False,
            "abort_immediately": False,
            "kv_transfer_params": params,
            "status": RequestStatus.WAITING,
            **fields,
        }
    )


def make_blocks(count: int, first: int = 100) -> Any:
    """Stands in for vLLM's KVCacheBlocks of one group."""
    return SimpleNamespace(get_block_ids=lambda: (list(range(first, first + count)),))


def make_ticket(token_ids: list[int], handoff: str = "1", **changes: Any) -> Ticket:
    ticket = Ticket(
        handoff_id=handoff * 32,
        engine_id="prefill-a",
        incarnation="f" * 32,
        fence=1,
        secret="a" * 32,
        request_id="prefill-1",
        block_ids=tuple(range(blocks_for(len(token_ids)))),
        num_tokens=len(token_ids),
        block_size=BLOCK,
        kv_axes="BHNC",
        tp_size=2,
        layout_hash="e" * 64,
        prompt_hash=prompt_hash(token_ids),
        readers=1,
        expires_at_s=1_700_000_100.0,
    )
    return dataclasses.replace(ticket, **changes)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


def tokens(count: int, start: int = 7) -> list[int]:
    return list(range(start, start + count))


def schedule(scheduler: BatonScheduler, request: Any, local_tokens: int = 0) -> tuple[int, bool]:
    """What vLLM's scheduler does with a waiting request that it can allocate blocks for."""
    count, is_async = scheduler.matched_tokens(request, local_tokens)
    assert isinstance(count, int)
    scheduler.after_alloc(request, make_blocks(blocks_for(request.num_prompt_tokens)), count)
    return count, is_async


def decode_request(token_ids: list[int], ticket: Ticket, **fields: Any) -> Any:
    return make_request(token_ids, ticket.to_params(), **fields)


NOTHING = BatonMetadata()
OFFER = {"do_remote_decode": True, "do_remote_prefill": False, "readers": 1}


def finish(
    scheduler: BatonScheduler,
    token_ids: list[int],
    *,
    params: dict[str, Any] | None = None,
    block_ids: list[int] | None = None,
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED,
    **fields: Any,
) -> tuple[bool, dict[str, Any] | None]:
    request = make_request(token_ids, OFFER if params is None else params, **fields)
    scheduler.on_new_request(request)
    schedule(scheduler, request)
    request.status = status
    ids = list(range(blocks_for(len(token_ids)))) if block_ids is None else block_ids
    return scheduler.request_finished(request, ids)
