"""The facade that vLLM talks to: one class, two roles, each delegated to its own object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from transfer.connector.limits import refuse_unsupported, refuse_unsupported_model
from transfer.connector.logs import log_with_vllm
from transfer.connector.metadata import BatonMetadata, WorkerHandshake, WorkerReport
from transfer.connector.scheduling.adapters import AdapterFingerprints
from transfer.connector.scheduling.scheduler import BatonScheduler
from transfer.connector.scheduling.ticket_writer import TicketWriter
from transfer.connector.settings import ConnectorSettings
from transfer.connector.stats import TransferPromMetrics, TransferStats
from transfer.connector.working.start import start_worker
from transfer.connector.working.worker import BatonWorker
from transfer.errors import ConfigurationError, Phase
from transfer.lifeline import die_with_parent

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class BatonConnector(KVConnectorBase_V1):
    """Hands a prompt's KV blocks from the engine that prefilled it to the one that decodes it.

    vLLM makes one in the scheduler (role ``SCHEDULER``) and one in every worker (``WORKER``); all
    calls come from that process's model thread. Settings are in
    :class:`~transfer.connector.settings.ConnectorSettings`.

    Raises:
        ConfigurationError: settings, or a model that cannot be handed over; says which.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_with_vllm()
        refuse_unsupported(vllm_config, kv_cache_config)
        transfer = self._kv_transfer_config
        self._settings = ConnectorSettings.from_extra_config(
            transfer.kv_connector_extra_config, str(transfer.kv_role or "")
        )
        if self._settings.die_with_parent:
            die_with_parent()
        self._scheduler: BatonScheduler | None = None
        self._worker: BatonWorker | None = None
        """None in the scheduler's process, and until the KV caches are registered."""
        self._num_blocks = kv_cache_config.num_blocks
        if role is KVConnectorRole.SCHEDULER:
            tickets = TicketWriter(
                engine_id=str(transfer.engine_id),
                tp_size=vllm_config.parallel_config.tensor_parallel_size,
                block_size=vllm_config.cache_config.block_size,
                ttl_s=self._settings.transfer.ticket_ttl_s,
                adapter_fingerprint=AdapterFingerprints(vllm_config.lora_config),
            )
            self._scheduler = BatonScheduler(
                tickets,
                producer=transfer.is_kv_producer,
                consumer=transfer.is_kv_consumer,
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """None: any will do. Refuses models, too.

        vLLM asks for it before it lays out the KV cache. For hybrids it fails to, with words that
        do not say why, and never makes a connector.

        Raises:
            ConfigurationError: a model that cannot be handed over.
        """
        refuse_unsupported_model(vllm_config)
        return None

    # ---- scheduler side ----------------------------------------------------------------------

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        handshakes = list(metadata.values())
        for handshake in handshakes:
            if not isinstance(handshake, WorkerHandshake):
                raise ConfigurationError(
                    f"the workers' connector is {type(handshake).__name__}, not BatonConnector",
                    phase=Phase.REGISTER,
                )
        first = handshakes[0]
        if any(handshake.num_slots != first.num_slots for handshake in handshakes):
            raise ConfigurationError(
                "the ranks have room for different numbers of blocks in host memory: "
                f"{[handshake.num_slots for handshake in handshakes]}",
                phase=Phase.REGISTER,
            )
        self._scheduler_side.set_handshake(first)

    def on_new_request(self, request: Request) -> None:
        self._scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler_side.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler_side.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler_side.take_metadata(
            idle=scheduler_output.total_num_scheduled_tokens == 0
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler_side.on_sent(connector_output.finished_sending or set())
        report = connector_output.kv_connector_worker_meta
        self._scheduler_side.on_loaded(
            connector_output.finished_recving or set(),
            report if isinstance(report, WorkerReport) else None,
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler_side.request_finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """Instructions still have to reach the worker; keeps an idle engine stepping till then."""
        return self._scheduler is not None and self._scheduler.has_pending

    # ---- worker side -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = start_worker(self._vllm_config, self._num_blocks, self._settings, kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker_side.handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Carries out this step's instructions before the model runs, not after it.

        vLLM starts asynchronous loads only after the forward pass; on a busy engine that delays
        a hand-over by a whole step, and an offer's readers likewise.
        """
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, BatonMetadata):
            self._worker_side.carry_out(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing left to do: see :meth:`bind_connector_metadata`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous and whole; a request runs only after its load."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing is saved layer by layer: prompts are offered as a whole."""

    def wait_for_save(self) -> None:
        """Nothing is saved layer by layer."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._worker_side.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker_side.take_report()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # ---- metrics -----------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return None if self._worker is None else self._worker.take_stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferPromMetrics:
        return TransferPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ------------------------------------------------------------------------------------------

    @property
    def worker(self) -> BatonWorker:
        """The worker side, for control calls that reach the worker process."""
        return self._worker_side

    @property
    def _scheduler_side(self) -> BatonScheduler:
        if self._scheduler is None:
            raise RuntimeError("a scheduler call reached the worker's connector")
        return self._scheduler

    @property
    def _worker_side(self) -> BatonWorker:
        if self._worker is None:
            raise RuntimeError(
                "a worker call reached the scheduler's connector, or came before the KV caches "
                "were registered"
            )
        return self._worker
