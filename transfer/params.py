"""``kv_transfer_params`` for a decode request, from the tickets of its prompts.

Kept apart from the ticket's own module so that a router can use it without importing vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer.ticket import TICKET_VERSION


def tickets_to_params(tickets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One ticket as it is, several as a bundle, none as None.

    The decode connector picks from a bundle by the hash of the prompt, so order does not matter.
    """
    if not tickets:
        return None
    if len(tickets) == 1:
        return dict(tickets[0])
    return {
        "version": TICKET_VERSION,
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "tickets": [dict(ticket) for ticket in tickets],
    }


def ticket_owners(params: Mapping[str, Any] | None) -> frozenset[str]:
    """The engines whose blocks the tickets in ``kv_transfer_params`` are for."""
    if not params:
        return frozenset()
    tickets = params.get("tickets", [params])
    return frozenset(str(t["remote_engine_id"]) for t in tickets if "remote_engine_id" in t)
