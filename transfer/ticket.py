"""The ticket: what a prefill answer tells the decode request about its KV blocks.

It travels as ``kv_transfer_params``, plain JSON, through whatever orchestrates the two sides. Names
that the field already has are kept; the rest is Baton's. Everything in it is checked when it comes
in, because it crossed a network and another program.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from transfer.errors import Phase, ProtocolError

TICKET_VERSION = 2
MAX_BLOCKS = 1 << 20
MAX_READERS = 1024
MAX_SECONDS = 1 << 50
MAX_TEXT_CHARS = 512
MAX_TP_SIZE = 256
"""A reader has threads for every rank of an owner that it reads from or tells something."""

_HEX32 = re.compile(r"[0-9a-f]{32}\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")


class Medium(NamedTuple):
    """An image, video or sound in a prompt.

    Attributes:
        identifier: names its content.
        first_token: where its place holders begin.
        num_tokens: how many there are.
    """

    identifier: str
    first_token: int
    num_tokens: int


def prompt_hash(
    token_ids: Sequence[int],
    *,
    media: Sequence[Medium] = (),
    adapter: str = "",
    cache_salt: str = "",
) -> str:
    """Names what a KV cache was computed from; 64 hex digits (BLAKE2b-256).

    Equal token ids are not enough: images hide behind equal placeholder ids, an adapter changes
    every layer, and a cache salt asks for separation. Decode compares this with its own prompt, so
    that a ticket that was attached to the wrong request is refused instead of answered wrongly.

    Args:
        adapter: fingerprint of the LoRA adapter's weights; empty: none.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"baton-prompt-2")
    digest.update(_words([len(token_ids), *token_ids, len(media)]))
    digest.update(_words([number for medium in media for number in medium[1:]]))
    for part in (*(medium.identifier for medium in media), adapter, cache_salt):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(_words([len(raw)]))
        digest.update(raw)
    return digest.hexdigest()


def _words(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One offered hand-off, as its owner described it.

    Attributes:
        handoff_id: uuid, 32 hex digits.
        engine_id: the owner's engine; its workers are ``engine_id/0 .. engine_id/tp_size-1``.
        incarnation: uuid of the owner's start.
        fence: number never reused within that incarnation.
        secret: 32 hex digits: whoever knows it may read these blocks.
        request_id: the request as the owner calls it, fit for a log and for a ticket.
        block_ids: the owner's blocks, in token order; the last may be partly filled.
        num_tokens: prompt tokens whose KV the blocks hold.
        block_size: tokens per block at the owner.
        kv_axes: order of the axes of its KV memory, outermost first: ``BHNC`` and the like.
        prompt_hash: see :func:`prompt_hash`.
        readers: how many requests read it (``n`` samples of one prompt).
        expires_at_s: Unix time at the owner when it gives up, unless renewed.
    """

    handoff_id: str
    engine_id: str
    incarnation: str
    fence: int
    secret: str = field(repr=False)
    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    block_size: int
    kv_axes: str
    tp_size: int
    layout_hash: str
    prompt_hash: str
    readers: int
    expires_at_s: float

    def to_params(self) -> dict[str, Any]:
        """The ticket as the ``kv_transfer_params`` of the decode request."""
        return {
            "version": TICKET_VERSION,
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_block_ids": list(self.block_ids),
            "tp_size": self.tp_size,
            "handoff_id": self.handoff_id,
            "incarnation": self.incarnation,
            "fence": self.fence,
            "num_tokens": self.num_tokens,
            "block_size": self.block_size,
            "kv_axes": self.kv_axes,
            "layout_hash": self.layout_hash,
            "prompt_hash": self.prompt_hash,
            "secret": self.secret,
            "readers": self.readers,
            "expires_at": self.expires_at_s,
        }

    @classmethod
    def from_params(cls, params: Any) -> Self:
        """Checks and reads what :meth:`to_params` wrote.

        Raises:
            ProtocolError: no JSON object, unknown version, or a field missing, of the wrong type or
                out of range; the message names the field.
        """
        if not isinstance(params, Mapping):
            raise _bad("a ticket must be a JSON object")
        fields = _Fields(params)
        version = fields.integer("version", 0, 1 << 31)
        if version != TICKET_VERSION:
            raise _bad(f"ticket version {version} is not supported, only {TICKET_VERSION}")
        num_tokens = fields.integer("num_tokens", 1, 1 << 40)
        block_size = fields.integer("block_size", 1, 1 << 20)
        block_ids = fields.block_ids("remote_block_ids")
        if len(block_ids) != -(-num_tokens // block_size):
            raise _bad(
                f"remote_block_ids has {len(block_ids)} blocks, but {num_tokens} tokens in blocks "
                f"of {block_size} need {-(-num_tokens // block_size)}"
            )
        return cls(
            handoff_id=fields.hex("handoff_id", _HEX32),
            engine_id=fields.text("remote_engine_id"),
            incarnation=fields.hex("incarnation", _HEX32),
            fence=fields.integer("fence", 1, (1 << 63) - 1),
            secret=fields.hex("secret", _HEX32),
            request_id=fields.text("remote_request_id"),
            block_ids=block_ids,
            num_tokens=num_tokens,
            block_size=block_size,
            kv_axes=fields.text("kv_axes"),
            tp_size=fields.integer("tp_size", 1, MAX_TP_SIZE),
            layout_hash=fields.hex("layout_hash", _HEX64),
            prompt_hash=fields.hex("prompt_hash", _HEX64),
            readers=fields.integer("readers", 1, MAX_READERS),
            expires_at_s=fields.number("expires_at"),
        )


def is_handoff_id(name: Any) -> bool:
    """Whether a hand-off can be called that."""
    return isinstance(name, str) and _HEX32.match(name) is not None


@dataclass(frozen=True, slots=True)
class UnreadableTicket:
    """What came in place of a ticket.

    Attributes:
        fault: why it cannot be read; names the field.
        handoff_id: what it calls its hand-off, by which that can be given up; empty: nothing.
    """

    fault: str
    handoff_id: str = ""


def read_ticket(params: Any) -> Ticket | UnreadableTicket:
    """Reads what should be a ticket, whatever it is."""
    try:
        return Ticket.from_params(params)
    except ProtocolError as error:
        name = params.get("handoff_id") if isinstance(params, Mapping) else None
        return UnreadableTicket(error.message, name if isinstance(name, str) else "")


def ticket_request(readers: int, handoff_id: str | None = None) -> dict[str, Any]:
    """``kv_transfer_params`` that ask a prefill engine for a ticket.

    Args:
        readers: how many requests will read it.
        handoff_id: what the hand-off shall be called, 32 hex digits; None: as the engine likes.
    """
    named = {} if handoff_id is None else {"handoff_id": handoff_id}
    return {"do_remote_decode": True, "do_remote_prefill": False, "readers": readers, **named}


class _Fields:
    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def _get(self, name: str) -> Any:
        if name not in self._params:
            raise _bad(f"the ticket has no {name}")
        return self._params[name]

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._get(name)
        if type(value) is not int or not low <= value <= high:
            raise _bad(f"{name} must be a whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        if type(value) not in (int, float) or not abs(value) < MAX_SECONDS:
            raise _bad(f"{name} must be a number of seconds")
        return float(value)

    def text(self, name: str) -> str:
        value = self._get(name)
        if (
            not isinstance(value, str)
            or not 0 < len(value) <= MAX_TEXT_CHARS
            or not value.isprintable()
        ):
            raise _bad(f"{name} must be a text of 1 to {MAX_TEXT_CHARS} printable characters")
        return value

    def hex(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not pattern.match(value):
            raise _bad(f"{name} must match {pattern.pattern}")
        return value

    def block_ids(self, name: str) -> tuple[int, ...]:
        value = self._get(name)
        if not isinstance(value, list) or not 0 < len(value) <= MAX_BLOCKS:
            raise _bad(f"{name} must be a list of 1 to {MAX_BLOCKS} block ids")
        if not all(type(item) is int and 0 <= item < 1 << 40 for item in value):
            raise _bad(f"{name} must hold whole numbers, none negative")
        return tuple(value)


def _bad(message: str) -> ProtocolError:
    return ProtocolError(message, phase=Phase.DISCOVER)
