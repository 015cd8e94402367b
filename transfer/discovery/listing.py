"""What etcd holds under a prefix at one revision. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd has it.

    Attributes:
        value: ``None`` in the event that deletes it.
        lease_id: of the lease that it goes with; 0 if there is none.
    """

    key: str
    value: bytes | None
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Keys and values at one revision, or the changes that led to it."""

    revision: int
    items: tuple[KeyValue, ...]
