"""The connector inside a vLLM worker: owns the transfer engine and the KV memory's registration.

All methods run on the worker's model thread; bytes move on the transfer engine's own threads.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.network_utils import get_ip

from transfer.connector.fingerprint import layout_hash
from transfer.connector.layout import KVLayout, LayerView, describe, plan_read
from transfer.connector.metadata import BatonMetadata, Holding, NewOffer, NewRead, WorkerHandshake
from transfer.connector.settings import ConnectorSettings
from transfer.connector.staging import HostMirror
from transfer.connector.stats import Outcome, TransferStats
from transfer.connector.ticket import Ticket
from transfer.discovery import make_discovery
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferHandle, TransferState
from transfer.engine.handoff import EndedHandoff, HandoffState, Offer
from transfer.errors import ConfigurationError, HandoffRefused, LayoutMismatch, Phase
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

_OWNER_OUTCOMES = {
    HandoffState.RELEASED: Outcome.RELEASED,
    HandoffState.ABORTED: Outcome.ABORTED,
    HandoffState.EXPIRED: Outcome.EXPIRED,
}


@dataclass(slots=True)
class _Load:
    read: NewRead
    handle: TransferHandle | None


class BatonWorker:
    """Worker side of the connector.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: says how many blocks the pool has.
        settings: the connector's.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: ConnectorSettings
    ) -> None:
        self._vllm_config = vllm_config
        self._num_blocks = kv_cache_config.num_blocks
        self._settings = _with_own_address(settings)
        self._tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._peer = PeerId(_engine_id(vllm_config), get_tensor_model_parallel_rank())
        self._incarnation = _shared_incarnation(self._tp_size)
        self._mirror: HostMirror | None = None
        self._layout: KVLayout | None = None
        self._layout_hash = ""
        self._engine: TransferEngine | None = None
        self._pinned: dict[str, NewOffer] = {}
        self._loads: dict[str, _Load] = {}
        self._failed_blocks: set[int] = set()
        self._reads_by_owner: Counter[str] = Counter()
        self._failed_by_owner: Counter[str] = Counter()
        self.stats = TransferStats()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Registers the KV memory, starts the transfer engine and publishes this worker.

        Args:
            kv_caches: layer name -> tensor ``[B, H, N, C]``; layers that share a tensor count once.

        Raises:
            ConfigurationError: memory that cannot be described or registered.
            PeerUnreachable: discovery does not answer.
        """
        tensors = list({tensor.data_ptr(): tensor for tensor in kv_caches.values()}.values())
        for tensor in tensors:
            if tensor.dim() != 4:
                raise ConfigurationError(
                    f"BatonConnector does not support KV tensors of shape {tuple(tensor.shape)}; "
                    "it expects [blocks, heads, tokens, content]",
                    phase=Phase.REGISTER,
                )
        axis_order = _axis_order(tensors[0])
        if self._settings.host_staging == "always" or tensors[0].device.type != "cpu":
            self._mirror = HostMirror(tensors, self._num_blocks)
            tensors = list(self._mirror.tensors)
        self._layout = describe(
            [_view(tensor) for tensor in tensors],
            num_blocks=self._num_blocks,
            block_size=self._vllm_config.cache_config.block_size,
            rank=self._peer.rank,
            tp_size=self._tp_size,
        )
        self._layout_hash = layout_hash(
            self._vllm_config,
            physical_layout=axis_order,
            attention_backend=_attention_backends(self._vllm_config),
        )
        discovery = make_discovery(self._settings.discovery)
        self._engine = TransferEngine(
            peer=self._peer,
            incarnation=self._incarnation,
            role=str(self._vllm_config.kv_transfer_config.kv_role),
            tp_size=self._tp_size,
            layout_hash=self._layout_hash,
            layout=self._layout.encode(),
            discovery=discovery,
            settings=self._settings.transfer,
        )
        for address, length in _storages(tensors):
            self._engine.register(address, length)
        discovery.ready(self._settings.transfer.connect_timeout_s * 5)
        self._engine.start()
        logger.info("transfer engine up: %r", self._engine)

    @property
    def handshake(self) -> WorkerHandshake:
        """What the scheduler side writes into tickets."""
        return WorkerHandshake(self._incarnation, self._layout_hash)

    @property
    def engine(self) -> TransferEngine:
        """The transfer engine; up once :meth:`register` returned."""
        if self._engine is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._engine

    def carry_out(self, metadata: BatonMetadata) -> None:
        """Starts whatever the scheduler side decided in this step. Does not wait."""
        if self._peer.rank == 0:
            for _ in range(metadata.refused):
                self.stats.count_read(Outcome.REFUSED, tokens=0)
            self.stats.count_recomputed(metadata.recomputed_tokens)
        for offer in metadata.offers:
            self._offer(offer)
        for read in metadata.reads:
            self._read(read)
        for request_id in metadata.cancels:
            load = self._loads.get(request_id)
            if load is not None and load.handle is not None:
                load.handle.cancel()
        for holding in metadata.forfeits:
            self.engine.submit_release(*self._addressee(holding), used=False)
            self.stats.count_read(Outcome.FORFEITED, tokens=0)
        by_owner: dict[PeerId, list[Credentials]] = {}
        for holding in metadata.renewals:
            owner, credentials = self._addressee(holding)
            by_owner.setdefault(owner, []).append(credentials)
        for owner, renewed in by_owner.items():
            self.engine.submit_renew(owner, renewed)

    def take_finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks readers are done with, and requests whose reads ended."""
        if self._engine is None:
            return None, None
        sent = {
            request_id
            for ended in self._engine.take_ended()
            if (request_id := self._ended(ended)) is not None
        }
        received = {
            request_id
            for request_id, load in self._loads.items()
            if load.handle is None or load.handle.state.is_final
        }
        for request_id in received:
            self._loaded(self._loads.pop(request_id))
        return sent or None, received or None

    def take_failed_blocks(self) -> set[int]:
        """Local blocks of reads that failed since the last call; their content is worthless."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def abort(self, handoff_ids: Sequence[str]) -> int:
        """Ends offers that nobody will read. Returns how many were still pinned."""
        known = [handoff_id for handoff_id in handoff_ids if handoff_id in self._pinned]
        for handoff_id in known:
            self.engine.abort(handoff_id, "the router gave it up")
        return len(known)

    def status(self) -> dict[str, Any]:
        """Totals since start and what is pinned now; plain JSON types."""
        return {
            "engine_id": self._peer.engine_id,
            "rank": self._peer.rank,
            "incarnation": self._incarnation,
            "pid": os.getpid(),
            "pinned_blocks": sum(len(o.ticket.block_ids) for o in self._pinned.values()),
            "offers": len(self._pinned),
            "loads": len(self._loads),
            "reads_by_owner": dict(self._reads_by_owner),
            "failed_by_owner": dict(self._failed_by_owner),
            "totals": self.stats.totals,
            "healthy": self._engine is not None and self._engine.healthy,
            "registered": self._engine is not None and self._engine.registered,
        }

    def close(self) -> None:
        """Withdraws this worker and stops the transfer engine. Safe to call twice."""
        if self._engine is not None:
            self._engine.close()

    # ------------------------------------------------------------------------------------------

    def _offer(self, offer: NewOffer) -> None:
        ticket = offer.ticket
        if self._mirror is not None:
            self._mirror.save(ticket.block_ids)
        self._pinned[ticket.handoff_id] = offer
        self.engine.offer(
            Offer(
                handoff_id=ticket.handoff_id,
                fence=ticket.fence,
                token=ticket.token,
                grant=self._own_layout.spans(ticket.block_ids),
                readers=ticket.readers,
                ttl_s=offer.ttl_s,
                num_blocks=len(ticket.block_ids),
            )
        )
        self._count_pinned()

    def _ended(self, ended: EndedHandoff) -> str | None:
        offer = self._pinned.pop(ended.handoff_id, None)
        if offer is None:
            return None
        self.stats.count_owner(_OWNER_OUTCOMES[ended.state])
        self._count_pinned()
        if ended.state is not HandoffState.RELEASED:
            logger.info("hand-off %s %s: %s", ended.handoff_id, ended.state.value, ended.reason)
        return offer.request_id

    def _read(self, read: NewRead) -> None:
        ticket = read.ticket
        handle = None
        if ticket.layout_hash == self._layout_hash and ticket.tp_size == self._tp_size:
            owner, credentials = self._addressee(Holding(read.request_id, ticket))
            handle = self.engine.submit_read(
                owner,
                credentials,
                _Planner(self._own_layout, read),
                deadline_s=self._settings.transfer.read_deadline_s,
            )
        else:
            logger.warning(
                "ticket of request %s refused: its KV layout or tp_size differs from ours",
                read.request_id,
            )
        self._loads[read.request_id] = _Load(read, handle)

    def _loaded(self, load: _Load) -> None:
        read, handle = load.read, load.handle
        if handle is not None and handle.state is TransferState.DONE:
            if self._mirror is not None:
                self._mirror.load(read.local_block_ids)
            timings = handle.timings
            self._reads_by_owner[read.ticket.engine_id] += 1
            self.stats.count_read(Outcome.OK, tokens=read.num_tokens)
            self.stats.count_bytes(handle.bytes_moved, timings.read_s, timings.total_s)
            return
        self._failed_blocks.update(read.local_block_ids)
        if handle is not None and handle.state is TransferState.CANCELLED:
            self.stats.count_read(Outcome.CANCELLED, tokens=0)
            self._forfeit(read)
            return
        error = None if handle is None else handle.error
        refused = handle is None or isinstance(error, HandoffRefused | LayoutMismatch)
        self.stats.count_read(Outcome.REFUSED if refused else Outcome.FAILED, tokens=0)
        if not refused:
            self._failed_by_owner[read.ticket.engine_id] += 1
        self.stats.count_recomputed(max(0, read.num_tokens - 1))
        if error is not None:
            logger.warning("read for request %s failed, recomputing: %s", read.request_id, error)
            if not refused:
                self._forfeit(read)

    def _forfeit(self, read: NewRead) -> None:
        owner, credentials = self._addressee(Holding(read.request_id, read.ticket))
        self.engine.submit_release(owner, credentials, used=False)

    def _addressee(self, holding: Holding) -> tuple[PeerId, Credentials]:
        ticket: Ticket = holding.ticket
        return PeerId(ticket.engine_id, self._peer.rank), Credentials(
            handoff_id=ticket.handoff_id,
            incarnation=ticket.incarnation,
            fence=ticket.fence,
            token=ticket.token,
            reader=f"{self._peer}#{holding.request_id}",
        )

    def _count_pinned(self) -> None:
        self.stats.set_pinned_blocks(
            sum(len(offer.ticket.block_ids) for offer in self._pinned.values())
        )

    @property
    def _own_layout(self) -> KVLayout:
        if self._layout is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._layout


@dataclass(frozen=True, slots=True)
class _Planner:
    """Pairs the owner's blocks with ours once the owner's layout is known."""

    local: KVLayout
    read: NewRead

    def __call__(self, info: PeerInfo) -> ReadPlan:
        remote = KVLayout.decode(info.layout)
        return plan_read(self.local, self.read.local_block_ids, remote, self.read.remote_block_ids)


def _with_own_address(settings: ConnectorSettings) -> ConnectorSettings:
    """``host: auto`` becomes the address that vLLM uses for this host (``VLLM_HOST_IP``)."""
    if settings.transfer.host != "auto":
        return settings
    return replace(settings, transfer=replace(settings.transfer, host=get_ip()))


def _engine_id(vllm_config: VllmConfig) -> str:
    return str(vllm_config.kv_transfer_config.engine_id)


def _shared_incarnation(tp_size: int) -> str:
    """One fresh uuid that all ranks of this start agree on."""
    own = uuid.uuid4().hex
    return str(get_tp_group().broadcast_object(own, src=0)) if tp_size > 1 else own


def _view(tensor: torch.Tensor) -> LayerView:
    size = tensor.element_size()
    blocks, heads, tokens, content = tensor.shape
    strides = [stride * size for stride in tensor.stride()]
    return LayerView(
        address=tensor.data_ptr(),
        shape=(blocks, heads, tokens, content),
        strides=(strides[0], strides[1], strides[2], strides[3]),
        itemsize=size,
    )


def _axis_order(tensor: torch.Tensor) -> str:
    strides = tensor.stride()
    order = sorted(range(4), key=lambda axis: (-strides[axis], axis))
    return "".join("BHNC"[axis] for axis in order)


def _attention_backends(vllm_config: VllmConfig) -> str:
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return ",".join(sorted({layer.get_attn_backend().get_name() for layer in layers.values()}))


def _storages(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Address and length in bytes of every distinct allocation behind ``tensors``."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    return sorted(storages.items())
