"""Tickets for tests that only pass them on."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

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


_NAMES = st.sampled_from(
    ["do_remote_prefill", "do_remote_decode", "version", "tickets", "readers", "handoff_id"]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(_NAMES | st.text(), inner),
    max_leaves=8,
)
_PASSABLE = st.sampled_from(
    [
        *(1, 3, 16, 17, 1 << 12, 1 << 40, (1 << 63) - 1),
        *("0" * 32, "f" * 64, "nobody", "\ud800", "NHBC", "x" * 512),
        *([1 << 39] * 3, [0, 0, 0], [2, 1, 0], [5], 0.0, -1e9),
    ]
)
"""What some field or other of a ticket takes."""


def instead_of(params: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Any JSON in place of a ticket: anything else, or the ticket changed, or a part of it."""
    names = st.sampled_from(sorted(params))
    return (
        JSON
        | st.dictionaries(names, JSON, max_size=4)
        | changed_params(params)
        | st.sets(names, min_size=1, max_size=2).map(
            lambda left_out: {name: params[name] for name in params.keys() - left_out}
        )
    )


def changed_params(params: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A ticket's, with other values, and perhaps what is no part of it."""
    fields = st.sampled_from([*params, "do_remote_decode", "other"])
    changes = st.dictionaries(fields, _PASSABLE | JSON, max_size=3)
    return changes.map(lambda changed: {**params, **changed})
