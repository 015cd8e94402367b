"""Worker records for tests."""

from __future__ import annotations

from transfer.types import PeerId, WorkerRecord


def worker_record(
    engine_id: str = "engine-a",
    rank: int = 0,
    *,
    incarnation: str = "first",
    port: int = 7000,
    role: str = "prefill",
) -> WorkerRecord:
    """A record that can be published."""
    return WorkerRecord(
        peer=PeerId(engine_id, rank),
        incarnation=incarnation,
        role=role,
        tp_size=1,
        addresses=(f"tcp://127.0.0.1:{port}",),
        layout_hash="layout",
        started_at_s=1_700_000_000.5,
    )
