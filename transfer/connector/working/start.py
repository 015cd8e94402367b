"""Starts the worker side: registers the KV memory, and makes whatever goes with it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tp_group
from vllm.utils.network_utils import get_ip

from transfer.addressing import is_every_address
from transfer.connector.kv.fingerprint import layout_hash
from transfer.connector.kv.tensors import backend_names
from transfer.connector.memory.kv_memory import KVMemory
from transfer.connector.metadata import WorkerHandshake
from transfer.connector.settings import ConnectorSettings
from transfer.connector.working.block_path import BlockPath
from transfer.connector.working.direct import Direct
from transfer.connector.working.in_place import InPlace
from transfer.connector.working.offers import PromptOffers
from transfer.connector.working.reads import PromptReads
from transfer.connector.working.staged import Staged
from transfer.connector.working.worker import BatonWorker
from transfer.discovery import make_discovery
from transfer.engine.engine import TransferEngine
from transfer.errors import ConfigurationError, Phase
from transfer.settings import AUTO
from transfer.types import PeerId

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def block_path_of(memory: KVMemory, name: str, on_end: Callable[[], None]) -> BlockPath:
    """The way of blocks to and from that memory.

    Args:
        name: of the worker.
        on_end: called from any thread when something of it has ended.
    """
    if memory.host_blocks is not None:
        return Staged(memory.host_blocks, memory.layout, memory.digests, name, on_end)
    if memory.in_place:
        return InPlace(memory.device, memory.layout, memory.digests, name, on_end)
    return Direct(memory.device, memory.layout, memory.digests)


def start_worker(
    vllm_config: VllmConfig,
    num_blocks: int,
    settings: ConnectorSettings,
    kv_caches: dict[str, torch.Tensor],
    path_of: Callable[[KVMemory, str, Callable[[], None]], BlockPath] = block_path_of,
) -> BatonWorker:
    """Registers the KV memory, starts the transfer engine and publishes this worker.

    On the model thread of every rank; blocks until discovery answers. Whatever fails leaves
    nothing behind.

    Args:
        vllm_config: the engine's configuration.
        num_blocks: of the KV cache, as the scheduler counts them.
        settings: the connector's.
        kv_caches: layer name -> tensor ``[B, H, N, C]``; layers that share a tensor count once.
        path_of: chooses the way of blocks.

    Raises:
        ConfigurationError: memory that cannot be described or registered, or no address that
            others could reach.
        PeerUnreachable: discovery does not answer.
    """
    settings = _with_own_address(settings)
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    peer = PeerId(str(vllm_config.kv_transfer_config.engine_id), get_tensor_model_parallel_rank())
    incarnation = _shared_incarnation(tp_size)
    memory = KVMemory(vllm_config, settings, kv_caches, num_blocks, peer.rank)
    layout = memory.layout
    with ExitStack() as closing:
        # Closed from the last to the first: the engine before what it uses.
        for kv_range in memory.ranges:
            closing.callback(kv_range.close)
        handshake = WorkerHandshake(
            incarnation=incarnation,
            layout_hash=layout_hash(
                vllm_config,
                packing=layout.packing,
                attention_backend=",".join(backend_names(vllm_config)),
            ),
            kv_axes=layout.axes,
            num_slots=memory.num_slots,
        )
        discovery = make_discovery(settings.discovery)
        closing.callback(discovery.close)
        engine = TransferEngine(
            peer=peer,
            incarnation=incarnation,
            role=str(vllm_config.kv_transfer_config.kv_role),
            tp_size=tp_size,
            layout_hash=handshake.layout_hash,
            layout=layout.encode(),
            discovery=discovery,
            settings=settings.transfer,
        )
        for kv_range in memory.ranges:
            engine.register(kv_range.address, kv_range.length, kv_range.dmabuf)
        path = path_of(memory, str(peer), engine.wake)
        closing.callback(path.close)
        closing.callback(engine.close)
        within_s = settings.transfer.connect_timeout_s * 5
        discovery.ready(within_s)
        engine.start()
        # Its record is written now: whoever hears that this engine is up can find it.
        discovery.ready(within_s)
        logger.info("transfer engine up: %r", engine)
        return BatonWorker(
            peer,
            handshake,
            engine,
            PromptOffers(layout, engine, path),
            PromptReads(
                peer,
                layout,
                handshake.layout_hash,
                engine,
                settings.transfer.read_deadline_s,
                path,
            ),
            closing.pop_all(),
        )


def _with_own_address(settings: ConnectorSettings) -> ConnectorSettings:
    """``host: auto`` becomes the address that vLLM uses for this host (``VLLM_HOST_IP``).

    Raises:
        ConfigurationError: that is none by which others could reach it.
    """
    if settings.transfer.host != AUTO:
        return settings
    host = get_ip()
    if is_every_address(host):  # also vLLM's answer if it finds none
        raise ConfigurationError(
            f"transfer.host is auto, and this machine's address is not known: vLLM says {host}; "
            "set VLLM_HOST_IP to the address by which other machines reach it, or transfer.host",
            phase=Phase.REGISTER,
        )
    return replace(settings, transfer=replace(settings.transfer, host=host))


def _shared_incarnation(tp_size: int) -> str:
    """One fresh uuid that all ranks of this start agree on."""
    own = uuid.uuid4().hex
    return str(get_tp_group().broadcast_object(own, src=0)) if tp_size > 1 else own
