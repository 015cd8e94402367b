"""What a decode rank tells the owners of prompts, with an engine that only listens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.kv_pools import Model, make_pool
from tests.support.scripted.tickets import make_ticket
from transfer.connector.metadata import HeldTicket
from transfer.connector.working.direct import Direct
from transfer.connector.working.reads import PromptReads
from transfer.engine.engine import TransferEngine
from transfer.transports.tcp.wire.fields import Fields, encode_claim
from transfer.types import Credentials, PeerId

LONG = "x" * 2000


class ListeningEngine:
    def __init__(self) -> None:
        self.told: list[Credentials] = []

    def submit_release(self, owner: PeerId, credentials: Credentials, used: bool) -> None:
        self.told.append(credentials)

    def submit_renew(self, owner: PeerId, credentials: Sequence[Credentials]) -> None:
        self.told += credentials


@pytest.fixture
def engine() -> ListeningEngine:
    return ListeningEngine()


@pytest.fixture
def reads(engine: ListeningEngine) -> PromptReads:
    model = Model("tokens", layers=1, heads=1, head_size=2, dtype=torch.int16)
    pool = make_pool(model, KVCacheLayout.LBHNC, num_blocks=1, kernel_tokens=4)
    return PromptReads(
        PeerId("decode", 0),
        pool.layout,
        "e" * 64,
        cast(TransferEngine, engine),
        1.0,
        Direct(torch.device("cpu"), pool.layout, None),
    )


@pytest.mark.parametrize(
    "request_id", ["", LONG, "é" * 2000, "a\0b", "a\nINFO all is well", "\ud800"]
)
def test_any_request_id_can_be_told_to_an_owner(
    engine: ListeningEngine, reads: PromptReads, request_id: str
) -> None:
    reads.forfeit(HeldTicket(request_id, make_ticket()))
    reads.renew([HeldTicket(request_id, make_ticket())])

    released, renewed = engine.told
    assert released == renewed
    assert Fields(encode_claim(released.claim)).claim() == released.claim
    assert released.reader.isprintable()


def test_requests_that_differ_at_their_end_are_two_readers(
    engine: ListeningEngine, reads: PromptReads
) -> None:
    for end in ("1", "2", "1"):
        reads.forfeit(HeldTicket(LONG + end, make_ticket()))

    first, other, again = (credentials.reader for credentials in engine.told)
    assert first == again != other
