"""Writes the tickets of one engine's prompts."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transfer.connector.metadata import WorkerHandshake
from transfer.printable import printable
from transfer.ticket import MAX_READERS, MAX_TEXT_CHARS, Medium, Ticket, is_handoff_id, prompt_hash

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request


_REMEMBERED_IDS = 1 << 16


class TicketWriter:
    """Gives every ticket an id, a secret and the next fence.

    Whoever asks for a prefill may name the hand-off, to be able to give it up before its ticket
    has come. A name that is none, or that was used before, is not taken.

    Args:
        engine_id: of this engine, fresh for every replica.
        adapter_fingerprint: names a LoRA adapter by its weights; None if it cannot.
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
        adapter_fingerprint: Callable[[LoRARequest], str | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.block_size = block_size
        self.ttl_s = ttl_s
        self._engine_id = engine_id
        self._tp_size = tp_size
        self._adapter_fingerprint = adapter_fingerprint
        self._clock = clock
        self._fence = 0
        self._used_ids: dict[str, None] = {}

    def write(
        self,
        request: Request,
        num_tokens: int,
        block_ids: Sequence[int],
        handshake: WorkerHandshake,
    ) -> Ticket | None:
        """The ticket for the first tokens of a request's prompt; None if nothing names it.

        Args:
            block_ids: where readers find them, as the owner's layout counts.
        """
        named = self.prompt_hash_of(request)
        if named is None:
            return None
        params = transfer_params(request)
        readers = params.get("readers", 1)
        if type(readers) is not int or not 1 <= readers <= MAX_READERS:
            readers = 1
        self._fence += 1
        return Ticket(
            handoff_id=self._unused_id(params.get("handoff_id")),
            engine_id=self._engine_id,
            incarnation=handshake.incarnation,
            fence=self._fence,
            secret=secrets.token_hex(16),
            request_id=printable(request.request_id[:MAX_TEXT_CHARS]),
            block_ids=tuple(block_ids),
            num_tokens=num_tokens,
            block_size=self.block_size,
            kv_axes=handshake.kv_axes,
            tp_size=self._tp_size,
            layout_hash=handshake.layout_hash,
            prompt_hash=named,
            readers=readers,
            expires_at_s=self._clock() + self.ttl_s,
        )

    def prompt_hash_of(self, request: Request) -> str | None:
        """Names what the KV cache of a request's prompt is computed from.

        None if that cannot be told: of a prompt given as embeddings, and of an adapter whose
        weights are not known.
        """
        if request.prompt_embeds is not None:
            return None
        adapter: str | None = ""
        if request.lora_request is not None:
            adapter = self._adapter_fingerprint(request.lora_request)
        if adapter is None:
            return None
        return prompt_hash(
            request.prompt_token_ids or [],
            media=[
                Medium(feature.identifier, feature.mm_position.offset, feature.mm_position.length)
                for feature in request.mm_features
            ],
            adapter=adapter,
            cache_salt=request.cache_salt or "",
        )

    def _unused_id(self, wanted: Any) -> str:
        """An id that this engine has not used."""
        if not is_handoff_id(wanted) or wanted in self._used_ids:
            wanted = uuid.uuid4().hex
        self._used_ids[wanted] = None
        if len(self._used_ids) > _REMEMBERED_IDS:
            del self._used_ids[next(iter(self._used_ids))]
        return str(wanted)


def transfer_params(request: Request) -> Mapping[str, Any]:
    """A request's ``kv_transfer_params``; empty where it has none, or something else by that name.

    vLLM takes them out of ``SamplingParams.extra_args``, where a client of a stock server can put
    anything. What this raised would end the engine.
    """
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else {}
