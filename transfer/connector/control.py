"""Calls from outside that reach the worker process: vLLM's ``worker_extension_cls``.

vLLM mixes this class into its worker, so that ``collective_rpc`` can call these methods by name.
Their names carry a prefix because vLLM refuses an extension that shadows a worker's own.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from transfer.connector.connector import BatonConnector


class WorkerControl:
    """Runs on the worker's model thread, between steps."""

    def baton_abort(self, handoff_ids: list[str]) -> int:
        """Gives up offers that nobody will read; returns how many were still pinned."""
        return _connector().worker.abort(handoff_ids)

    def baton_status(self) -> dict[str, Any]:
        """Totals since start and what is pinned now, plain JSON types."""
        return _connector().worker.status()


def _connector() -> BatonConnector:
    connector = get_kv_transfer_group()
    if not isinstance(connector, BatonConnector):
        raise RuntimeError(f"the engine runs {type(connector).__name__}, not BatonConnector")
    return connector
