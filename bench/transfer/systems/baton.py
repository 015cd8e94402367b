"""Baton's transfer engine: a hand-off is offered, read and confirmed."""

from __future__ import annotations

import os
import uuid
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter
from bench.transfer.systems.base import OwnerEnd, ReaderEnd
from transfer.discovery.static import StaticDiscovery
from transfer.engine.engine import TransferEngine
from transfer.engine.handle import TransferState
from transfer.engine.handoff import Offer
from transfer.settings import TransferSettings
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan, SpanArray, WorkerRecord

TRANSPORT_VARIABLE = "BENCH_BATON_TRANSPORT"
DEVICE_VARIABLE = "RDMA_DEVICE"
_OWNER = PeerId("owner", 0)
_INCARNATION = "bench"
_LAYOUT_HASH = "bench"
_DEADLINE_S = 60.0
_TTL_S = 3600.0


def _engine(peer: PeerId, records: list[WorkerRecord], streams: int) -> TransferEngine:
    return TransferEngine(
        peer=peer,
        incarnation=_INCARNATION,
        role="bench",
        tp_size=1,
        layout_hash=_LAYOUT_HASH,
        layout=b"",
        discovery=StaticDiscovery(records),
        settings=TransferSettings(
            transports=(os.environ[TRANSPORT_VARIABLE],),
            streams_per_peer=streams,
            read_deadline_s=_DEADLINE_S,
            rdma_device=os.environ.get(DEVICE_VARIABLE, ""),
        ),
    )


def _spans(base: int, where: Scatter, remote: bool) -> SpanArray:
    offsets = where.remote if remote else where.local
    spans = np.empty((offsets.size, 2), dtype=np.uint64)
    spans[:, 0] = offsets.astype(np.uint64) + np.uint64(base)
    spans[:, 1] = where.block_bytes
    return spans


# What --before measures may be a build in which an offer says how many blocks it has.
_COUNTED: dict[str, Any] = {"num_blocks": 0} if "num_blocks" in Offer.__dataclass_fields__ else {}


class Owner(OwnerEnd):
    def open(self, pool: Pool, scratch: str) -> dict[str, Any]:
        self._base = pool.address
        self._engine = _engine(_OWNER, [], streams=2)
        self._engine.register(pool.address, pool.size_bytes)
        self._engine.start()
        self._fence = 0
        return {"addresses": list(self._engine.addresses)}

    def offer(self, where: Scatter, reads: int) -> dict[str, Any]:
        self._engine.take_ended()
        self._fence += 1
        handoff_id, secret = uuid.uuid4().hex, uuid.uuid4().hex
        grant = _spans(self._base, where, remote=True)
        # Every read is confirmed, which ends it for its reader: so each goes by another name.
        # By position, as other builds have other names for the secret.
        self._engine.offer(Offer(handoff_id, self._fence, secret, grant, reads, _TTL_S, **_COUNTED))
        return asdict(Credentials(handoff_id, _INCARNATION, self._fence, secret, ""))

    def close(self) -> None:
        self._engine.close()


class Reader(ReaderEnd):
    def open(self, pool: Pool, scratch: str, owner: dict[str, Any]) -> None:
        self._pool = pool
        self._remote_base = int(owner["base"])
        self._record = WorkerRecord(
            _OWNER, "", "bench", 1, tuple(owner["addresses"]), "", started_at_s=0.0
        )
        # The number of streams is a setting of the engine.
        self._engines: dict[int, TransferEngine] = {}

    def load(self, case: Case, where: Scatter) -> None:
        self._plan = ReadPlan(
            local=_spans(self._pool.address, where, remote=False),
            remote=_spans(self._remote_base, where, remote=True),
        )
        self._streams = case.streams
        self._current = self._engines.get(case.streams) or self._start(case.streams)

    def ready(self, offer: dict[str, Any]) -> None:
        self._offer = offer
        self._reads = 0

    def disconnect(self) -> None:
        self._engines.pop(self._streams).close()
        self._current = self._start(self._streams)

    def read(self) -> None:
        self._reads += 1
        proof = Credentials(**{**self._offer, "reader": f"reader-{self._reads}"})
        handle = self._current.submit_read(_OWNER, proof, self._planned, _DEADLINE_S)
        handle.wait()
        if handle.state is not TransferState.DONE:
            raise RuntimeError(f"{handle.state.value}: {handle.error}")

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _planned(self, _: PeerInfo) -> ReadPlan:
        return self._plan

    def _start(self, streams: int) -> TransferEngine:
        engine = _engine(PeerId(f"reader-{streams}", 0), [self._record], streams)
        engine.register(self._pool.address, self._pool.size_bytes)
        engine.start()
        self._engines[streams] = engine
        return engine
