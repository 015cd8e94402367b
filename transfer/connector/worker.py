"""The connector inside a vLLM worker: owns the transfer engine and the KV memory's registration.

All methods run on the worker's model thread; bytes move on the transfer engine's own threads.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tp_group
from vllm.utils.network_utils import get_ip

from transfer.addressing import is_every_address
from transfer.connector.digests import BlockDigests
from transfer.connector.fingerprint import layout_hash
from transfer.connector.in_place import InPlace
from transfer.connector.kv_memory import KVMemory
from transfer.connector.kv_ranges import KVRange
from transfer.connector.kv_tensors import backend_names
from transfer.connector.layout import KVLayout
from transfer.connector.metadata import BatonMetadata, WorkerHandshake, WorkerReport
from transfer.connector.offers import PromptOffers
from transfer.connector.pairing import Stretch, digest_units
from transfer.connector.reads import EndedRead, PromptReads
from transfer.connector.settings import ConnectorSettings
from transfer.connector.staging import Staging
from transfer.connector.stats import Outcome, TransferStats
from transfer.discovery import make_discovery
from transfer.engine.engine import TransferEngine
from transfer.errors import ConfigurationError, Phase
from transfer.settings import AUTO
from transfer.types import PeerId

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.004
"""How long a step without computation waits for something to end.

vLLM steps on while blocks are on their way or pinned, a thousand times a second, and the ranks of
an engine spin between the steps: on cores that the transfer needs too. A request that comes
meanwhile waits as long at most.
"""


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
        self._staging: Staging | InPlace | None = None
        self._ranges: list[KVRange] = []
        self._num_slots = 0
        self._digests: BlockDigests | None = None
        self._said_unchecked = False
        self._layout: KVLayout | None = None
        self._layout_hash = ""
        self._engine: TransferEngine | None = None
        self._offers: PromptOffers | None = None
        self._reads: PromptReads | None = None
        self._failed_blocks: set[int] = set()
        self._idle = False
        self._report: dict[str, Outcome] = {}
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
        memory = KVMemory(
            self._vllm_config, self._settings, kv_caches, self._num_blocks, self._peer.rank
        )
        layout, self._digests = memory.layout, memory.digests
        self._layout = layout
        self._num_slots = memory.num_slots
        self._layout_hash = layout_hash(
            self._vllm_config,
            packing=layout.packing,
            attention_backend=",".join(backend_names(self._vllm_config)),
        )
        discovery = make_discovery(self._settings.discovery)
        self._engine = TransferEngine(
            peer=self._peer,
            incarnation=self._incarnation,
            role=str(self._vllm_config.kv_transfer_config.kv_role),
            tp_size=self._tp_size,
            layout_hash=self._layout_hash,
            layout=layout.encode(),
            discovery=discovery,
            settings=self._settings.transfer,
        )
        self._ranges = memory.ranges
        for piece in memory.ranges:
            self._engine.register(piece.address, piece.length, piece.dmabuf)
        within_s = self._settings.transfer.connect_timeout_s * 5
        discovery.ready(within_s)
        self._engine.start()
        # Its record is written now: whoever hears that this engine is up can find it.
        discovery.ready(within_s)
        if memory.host_blocks is not None:
            self._staging = Staging(
                memory.host_blocks, layout, self._digests, str(self._peer), self._engine.wake
            )
        elif memory.in_place:
            self._staging = InPlace(memory.device, str(self._peer), self._engine.wake)
        self._offers = PromptOffers(layout, self._engine, self._digests, self._staging)
        self._reads = PromptReads(
            self._peer,
            layout,
            self._layout_hash,
            self._engine,
            self._settings.transfer.read_deadline_s,
            self._staging,
        )
        logger.info("transfer engine up: %r", self._engine)

    @property
    def rank(self) -> int:
        """Tensor-parallel rank of this worker."""
        return self._peer.rank

    @property
    def handshake(self) -> WorkerHandshake:
        """What the scheduler side writes into tickets."""
        return WorkerHandshake(
            self._incarnation, self._layout_hash, self._own_layout.axes, self._num_slots
        )

    @property
    def engine(self) -> TransferEngine:
        """The transfer engine; up once :meth:`register` returned."""
        if self._engine is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._engine

    def carry_out(self, metadata: BatonMetadata) -> None:
        """Starts whatever the scheduler side decided in this step. Does not wait."""
        self._idle = metadata.idle
        offers = self._prompt_offers
        for offer in metadata.offers:
            offers.start(offer)
        if metadata.offers:
            self._count_pinned()
        reads = self._prompt_reads
        for read in metadata.reads:
            reads.start(read)
        for request_id in metadata.cancels:
            reads.cancel(request_id)
        for holding in metadata.forfeits:
            reads.forfeit(holding)
        reads.renew(metadata.renewals)
        if not self._counts:
            return
        for _ in metadata.forfeits:
            self.stats.count_read(Outcome.FORFEITED, tokens=0)
        for verdict in metadata.verdicts:
            if verdict.outcome is not None:
                self.stats.count_read(verdict.outcome, tokens=verdict.tokens)
            self.stats.count_recomputed(verdict.recomputed_tokens)

    def take_finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks readers are done with, and requests whose reads ended.

        In a step in which the model had nothing to compute, waits up to 4 ms for the first one.
        """
        if self._engine is None:
            return None, None
        offers = self._prompt_offers
        if self._idle and (offers or self._prompt_reads):
            self._engine.wait_for_end(_IDLE_WAIT_S)
        sent, received = set(), set()
        for over in offers.take_ended():
            if self._counts:
                self.stats.count_owner(over.outcome)
            sent.add(over.request_id)
        if sent:
            self._count_pinned()
        for ended in self._prompt_reads.take_ended():
            outcome = self._arrived(ended)
            owner = ended.read.ticket.engine_id
            if outcome is Outcome.OK:
                self._reads_by_owner[owner] += 1
            elif outcome in (Outcome.FAILED, Outcome.UNPROVEN, Outcome.CORRUPTED):
                self._failed_by_owner[owner] += 1
            if outcome is not Outcome.OK:
                self._failed_blocks.update(ended.read.local_block_ids)
            self._report[ended.read.request_id] = outcome
            received.add(ended.read.request_id)
        return sent or None, received or None

    def take_failed_blocks(self) -> set[int]:
        """Local blocks of reads that failed since the last call; their content is worthless."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> WorkerReport | None:
        """How the reads that ended since the last call ended on this rank."""
        report, self._report = self._report, {}
        return WorkerReport(report) if report else None

    def take_stats(self) -> TransferStats | None:
        """What was counted since the last call, or None if nothing was."""
        if self._engine is not None:
            self.stats.count_overwritten(self._engine.overwritten)
        return self.stats.take()

    def abort(self, handoff_ids: Sequence[str]) -> int:
        """Ends offers that nobody will read. Returns how many were still pinned."""
        return self._prompt_offers.abort(handoff_ids)

    def status(self) -> dict[str, Any]:
        """Totals since start and what is pinned now; plain JSON types."""
        return {
            "engine_id": self._peer.engine_id,
            "rank": self._peer.rank,
            "incarnation": self._incarnation,
            "pid": os.getpid(),
            "pinned_blocks": 0 if self._offers is None else self._offers.num_blocks,
            "offers": 0 if self._offers is None else len(self._offers),
            "loads": 0 if self._reads is None else len(self._reads),
            "reads_by_owner": dict(self._reads_by_owner),
            "failed_by_owner": dict(self._failed_by_owner),
            "totals": self.stats.totals,
            "healthy": self._engine is not None and self._engine.healthy,
            "registered": self._engine is not None and self._engine.registered,
            "overwritten": 0 if self._engine is None else self._engine.overwritten,
        }

    def close(self) -> None:
        """Withdraws this worker and stops the transfer engine. Safe to call twice."""
        if self._engine is not None:
            self._engine.close()
        if self._staging is not None:
            self._staging.close()
        ranges, self._ranges = self._ranges, []
        for piece in ranges:
            piece.close()

    # ------------------------------------------------------------------------------------------

    def _arrived(self, ended: EndedRead) -> Outcome:
        """A read ended: takes its blocks in, if they are what the owner had."""
        read, outcome = ended.read, ended.outcome
        if outcome is Outcome.OK and not self._is_what_the_owner_had(ended):
            outcome = Outcome.CORRUPTED
        if outcome is Outcome.OK:
            self.stats.count_bytes(ended.bytes_moved, ended.read_s, ended.total_s)
        elif outcome is Outcome.CORRUPTED:
            logger.error(
                "blocks of request %s arrived changed from engine %s, recomputing",
                read.request_id,
                read.ticket.engine_id,
            )
        return outcome

    def _is_what_the_owner_had(self, ended: EndedRead) -> bool:
        read = ended.read
        if self._digests is None:
            return True
        if not ended.has_digests:
            if not self._said_unchecked:
                logger.warning(
                    "engine %s offers blocks without digests; transfer.digests must be set on "
                    "both sides. Its blocks are used unchecked",
                    read.ticket.engine_id,
                )
            self._said_unchecked = True
            return True
        if isinstance(self._staging, Staging):
            return True  # Compared before the blocks were copied to the device.
        first = read.first_token
        stretch = Stretch(
            first,
            first + read.num_tokens,
            read.targets,
            first // self._own_layout.block_size,
        )
        return self._digests.agree(digest_units(self._own_layout, stretch))

    def _count_pinned(self) -> None:
        if self._counts:
            self.stats.set_pinned_blocks(self._prompt_offers.num_blocks)

    @property
    def _counts(self) -> bool:
        """Whether this rank counts what concerns a request as a whole, for all ranks."""
        return self._peer.rank == 0

    @property
    def _prompt_offers(self) -> PromptOffers:
        if self._offers is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._offers

    @property
    def _prompt_reads(self) -> PromptReads:
        if self._reads is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._reads

    @property
    def _own_layout(self) -> KVLayout:
        if self._layout is None:
            raise RuntimeError("the KV caches are not registered yet")
        return self._layout


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


def _engine_id(vllm_config: VllmConfig) -> str:
    return str(vllm_config.kv_transfer_config.engine_id)


def _shared_incarnation(tp_size: int) -> str:
    """One fresh uuid that all ranks of this start agree on."""
    own = uuid.uuid4().hex
    return str(get_tp_group().broadcast_object(own, src=0)) if tp_size > 1 else own
