"""Tickets for tests that only pass them on."""

from __future__ import annotations

from typing import Any

from transfer.ticket import Ticket


def make_ticket(digit: str = "1", **changes: Any) -> Ticket:
    """A ticket whose hand-off is named by a hex digit, 32 times."""
    fields: dict[str, Any] = {
        "handoff_id": digit * 32,
        "engine_id": "engine-p",
        "incarnation": "f" * 32,
        "fence": 1,
        "secret": "a" * 32,
        "request_id": "prefill-1",
        "block_ids": (7,),
        "num_tokens": 5,
        "block_size": 16,
        "kv_axes": "BHNC",
        "tp_size": 1,
        "layout_hash": "e" * 64,
        "prompt_hash": "b" * 64,
        "readers": 1,
        "expires_at_s": 1_700_000_100.0,
        **changes,
    }
    return Ticket(**fields)
