"""A connector whose reads can be made to arrive damaged: the fault that digests are for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.support.napping_ranks import nap_instead_of_spinning
from transfer.connector.connector import BatonConnector
from transfer.connector.reads import EndedRead
from transfer.connector.stats import Outcome
from transfer.connector.worker import BatonWorker

FOLDER = "BATON_TEST_CORRUPT"
"""Environment variable that names a folder. A file in it, named like a rank, damages the next
read that arrives there by one bit, and is deleted by that."""


nap_instead_of_spinning()


class CorruptingWorker(BatonWorker):
    """Damages what arrived before it is checked."""

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register(kv_caches)
        self._tensors = list(kv_caches.values())

    def _arrived(self, ended: EndedRead) -> Outcome:
        armed = Path(os.environ[FOLDER]) / str(self.rank)
        if ended.outcome is Outcome.OK and armed.exists():
            armed.unlink()
            block = ended.read.local_block_ids[0]
            cell = self._tensors[-1][block, 0].view(torch.uint8)
            cell[3, 5] ^= 64
        return super()._arrived(ended)


class CorruptingConnector(BatonConnector):
    worker_class: ClassVar[Any] = CorruptingWorker
