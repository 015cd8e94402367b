"""Writes the tickets of one engine's prompts."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transfer.connector.metadata import WorkerHandshake
from transfer.connector.ticket import MAX_READERS, MAX_TEXT_CHARS, Ticket, prompt_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request


class TicketWriter:
    """Gives every ticket an id, a secret and the next fence.

    Args:
        engine_id: of this engine, fresh for every replica.
        clock: Unix time in seconds.

    Attributes:
        block_size: tokens per block.
        ttl_s: how long an offer lives unless renewed, in seconds.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        tp_size: int,
        block_size: int,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.block_size = block_size
        self.ttl_s = ttl_s
        self._engine_id = engine_id
        self._tp_size = tp_size
        self._clock = clock
        self._fence = 0

    def write(
        self,
        request: Request,
        num_tokens: int,
        block_ids: Sequence[int],
        handshake: WorkerHandshake,
    ) -> Ticket:
        """The ticket for the first tokens of a request's prompt.

        Args:
            block_ids: where readers find them, as the owner's layout counts.
        """
        readers = transfer_params(request).get("readers", 1)
        if type(readers) is not int or not 1 <= readers <= MAX_READERS:
            readers = 1
        self._fence += 1
        return Ticket(
            handoff_id=uuid.uuid4().hex,
            engine_id=self._engine_id,
            incarnation=handshake.incarnation,
            fence=self._fence,
            token=secrets.token_hex(16),
            request_id=request.request_id[:MAX_TEXT_CHARS],
            block_ids=tuple(block_ids),
            num_tokens=num_tokens,
            block_size=self.block_size,
            kv_axes=handshake.kv_axes,
            tp_size=self._tp_size,
            layout_hash=handshake.layout_hash,
            prompt_hash=prompt_hash_of(request),
            readers=readers,
            expires_at_s=self._clock() + self.ttl_s,
        )


def transfer_params(request: Request) -> Mapping[str, Any]:
    """A request's ``kv_transfer_params``; empty where it has none, or something else by that name.

    vLLM takes them out of ``SamplingParams.extra_args``, where a client of a stock server can put
    anything. What this raised would end the engine.
    """
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else {}


def prompt_hash_of(request: Request) -> str:
    """Names what the KV cache of a request's prompt is computed from."""
    return prompt_hash(
        request.prompt_token_ids or [],
        mm_identifiers=[feature.identifier for feature in request.mm_features],
        lora_name=request.lora_request.lora_name if request.lora_request is not None else "",
        cache_salt=request.cache_salt or "",
    )
