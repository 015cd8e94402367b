"""What the connector counts, in the shape that vLLM's stat loggers carry."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from transfer.connector.outcomes import OfferOutcome, ReadOutcome


class TransferStats(KVConnectorStats):
    """Counts since the last time they were taken; adds up over workers and steps.

    ``data`` holds plain numbers and lists only, because it crosses processes.
    """

    data: dict[str, Any]
    _SUMS: ClassVar[tuple[str, ...]] = ("bytes", "tokens", "recomputed_tokens", "overwritten")
    _LISTS: ClassVar[tuple[str, ...]] = ("read_seconds", "handoff_seconds")

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()
        self._totals: dict[str, int] = {}
        self._overwritten = 0

    def reset(self) -> None:
        """Starts counting anew; the gauge keeps its value until it is set again."""
        self.data = {
            "owner": {},
            "reader": {},
            "bytes": 0,
            "tokens": 0,
            "recomputed_tokens": 0,
            "overwritten": 0,
            "read_seconds": [],
            "handoff_seconds": [],
            "pinned_blocks": None,
        }

    def count_offer(self, outcome: OfferOutcome) -> None:
        """One of our offers ended."""
        owner = self.data["owner"]
        owner[outcome.value] = owner.get(outcome.value, 0) + 1

    def count_read(self, outcome: ReadOutcome, *, tokens: int) -> None:
        """One of our reads ended; ``tokens`` were fetched."""
        reader = self.data["reader"]
        reader[outcome.value] = reader.get(outcome.value, 0) + 1
        self.data["tokens"] += tokens

    def count_bytes(self, moved: int, read_s: float, handoff_s: float) -> None:
        """A read was confirmed: bytes moved, seconds they took, seconds from ticket to OK."""
        self.data["bytes"] += moved
        self.data["read_seconds"].append(read_s)
        self.data["handoff_seconds"].append(handoff_s)

    def count_recomputed(self, tokens: int) -> None:
        """Prompt tokens that came with a ticket and must be computed here all the same."""
        self.data["recomputed_tokens"] += tokens

    def count_overwritten(self, since_start: int) -> None:
        """How often another's value was found in the place of this worker's record."""
        self.data["overwritten"] += since_start - self._overwritten
        self._overwritten = since_start

    def set_pinned_blocks(self, blocks: int) -> None:
        """Blocks pinned for readers now."""
        self.data["pinned_blocks"] = blocks

    def is_empty(self) -> bool:
        """Whether nothing was counted since the last reset."""
        return not any(self.data[name] for name in self.data if name != "pinned_blocks") and (
            self.data["pinned_blocks"] is None
        )

    def aggregate(self, other: KVConnectorStats) -> TransferStats:
        """Adds ``other`` to this one."""
        for side in ("owner", "reader"):
            for outcome, count in other.data[side].items():
                self.data[side][outcome] = self.data[side].get(outcome, 0) + count
        for name in self._SUMS:
            self.data[name] += other.data[name]
        for name in self._LISTS:
            self.data[name] += other.data[name]
        if other.data["pinned_blocks"] is not None:
            self.data["pinned_blocks"] = other.data["pinned_blocks"]
        return self

    def take(self) -> TransferStats | None:
        """What was counted since the last call, or None if nothing was."""
        if self.is_empty():
            return None
        taken = TransferStats(copy.copy(self.data))
        self._totals = _added(self._totals, self.data)
        self.reset()
        return taken

    @property
    def totals(self) -> dict[str, int]:
        """Counts since start, taken or not: ``owner_released``, ``reader_ok``, ``bytes`` ..."""
        return _added(self._totals, self.data)

    def reduce(self) -> dict[str, int | float]:
        """One log line's worth."""
        reads = self.data["read_seconds"]
        handoffs = self.data["handoff_seconds"]
        megabytes = self.data["bytes"] / 1e6
        return {
            "Hand-offs read": self.data["reader"].get(ReadOutcome.OK.value, 0),
            "Hand-offs served": self.data["owner"].get(OfferOutcome.RELEASED.value, 0),
            "MB moved": round(megabytes, 3),
            "MB/s": round(megabytes / sum(reads), 1) if reads else 0.0,
            "Avg hand-off (ms)": round(1e3 * sum(handoffs) / len(handoffs), 2) if handoffs else 0.0,
            "Tokens recomputed": self.data["recomputed_tokens"],
        }


def _added(totals: dict[str, int], data: dict[str, Any]) -> dict[str, int]:
    summed = dict(totals)
    for side in ("owner", "reader"):
        for outcome, count in data[side].items():
            summed[f"{side}_{outcome}"] = summed.get(f"{side}_{outcome}", 0) + count
    for name in ("bytes", "tokens", "recomputed_tokens"):
        summed[name] = summed.get(name, 0) + data[name]
    return summed


class TransferPromMetrics(KVConnectorPromMetrics):
    """Baton's metrics beside vLLM's own, through whatever vLLM exports them (Prometheus or Ray)."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._per_outcome: dict[tuple[int, str, str], Any] = {}
        self._handoffs = self._counter_cls(
            name="baton:handoffs",
            documentation="Hand-offs by side (owner, reader) and outcome.",
            labelnames=[*labelnames, "side", "outcome"],
        )
        self._bytes = self._counter(
            "baton:transfer_bytes", "KV bytes read from prefill workers.", labelnames
        )
        self._tokens = self._counter(
            "baton:transfer_tokens", "Prompt tokens whose KV came by hand-off.", labelnames
        )
        self._recomputed = self._counter(
            "baton:recomputed_tokens",
            "Prompt tokens that came with a ticket and were computed by decode all the same.",
            labelnames,
        )
        self._overwritten = self._counter(
            "baton:overwritten_records",
            "Times that another's value was found where a record of this engine should be in etcd.",
            labelnames,
        )
        seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
        self._read_seconds = self._histogram(
            "baton:transfer_seconds",
            "Seconds that the bytes of one hand-off took.",
            labelnames,
            seconds,
        )
        self._handoff_seconds = self._histogram(
            "baton:handoff_seconds",
            "Seconds from the decode engine's start of a read to the owner's confirmation.",
            labelnames,
            seconds,
        )
        self._pinned = create_metric_per_engine(
            self._gauge_cls(
                name="baton:pinned_blocks",
                documentation="KV blocks pinned for decode workers.",
                labelnames=labelnames,
            ),
            self.per_engine_labelvalues,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one step's stats."""
        for side in ("owner", "reader"):
            for outcome, count in transfer_stats_data[side].items():
                self._outcome_counter(engine_idx, side, outcome).inc(count)
        self._bytes[engine_idx].inc(transfer_stats_data["bytes"])
        self._tokens[engine_idx].inc(transfer_stats_data["tokens"])
        self._recomputed[engine_idx].inc(transfer_stats_data["recomputed_tokens"])
        self._overwritten[engine_idx].inc(transfer_stats_data["overwritten"])
        for value in transfer_stats_data["read_seconds"]:
            self._read_seconds[engine_idx].observe(value)
        for value in transfer_stats_data["handoff_seconds"]:
            self._handoff_seconds[engine_idx].observe(value)
        if transfer_stats_data["pinned_blocks"] is not None:
            self._pinned[engine_idx].set(transfer_stats_data["pinned_blocks"])

    def _outcome_counter(self, engine_idx: int, side: str, outcome: str) -> Any:
        key = (engine_idx, side, outcome)
        if key not in self._per_outcome:
            labels = [*self.per_engine_labelvalues[engine_idx], side, outcome]
            self._per_outcome[key] = self._handoffs.labels(*labels)
        return self._per_outcome[key]

    def _counter(self, name: str, documentation: str, labelnames: list[str]) -> Any:
        return create_metric_per_engine(
            self._counter_cls(name=name, documentation=documentation, labelnames=labelnames),
            self.per_engine_labelvalues,
        )

    def _histogram(
        self, name: str, documentation: str, labelnames: list[str], buckets: list[float]
    ) -> Any:
        return create_metric_per_engine(
            self._histogram_cls(
                name=name, documentation=documentation, labelnames=labelnames, buckets=buckets
            ),
            self.per_engine_labelvalues,
        )
