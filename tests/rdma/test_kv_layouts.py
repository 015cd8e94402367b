"""A hand-off between two KV memories of the shapes that vLLM's attention backends use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.transfer_cases import TransferCase
from tests.support.transfer_engines import Directory, make_engine, succeeds, take_ended
from transfer.engine.handoff import HandoffState, Offer
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 4, 48, 2, 16, 128


def _layout_module() -> ModuleType:
    """``transfer.connector.layout`` by its path: its package imports vLLM."""
    import transfer

    path = Path(transfer.__file__).parent / "connector" / "layout.py"
    spec = importlib.util.spec_from_file_location("layout_by_path", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


layout: Any = _layout_module()

# Physical orders of (block, head, token, content), outermost first.
TOGETHER = (0, 1, 2, 3)
HEADS_APART = (1, 0, 2, 3)


class Worker:
    """KV memory of one worker: a tensor per layer, logically ``[B, H, N, C]``."""

    def __init__(self, order: tuple[int, ...], blocks: int, *, seed: int) -> None:
        logical = (blocks, HEADS, TOKENS, CONTENT)
        random = np.random.default_rng(seed)
        self.memory: list[NDArray[np.uint16]] = []
        self.layers: list[NDArray[np.uint16]] = []
        for _ in range(LAYERS):
            shape = [logical[axis] for axis in order]
            physical = random.integers(0, 1 << 16, shape, dtype=np.uint16)
            self.memory.append(physical)
            self.layers.append(physical.transpose(np.argsort(order)))
        views = [
            layout.LayerView(int(tensor.ctypes.data), tensor.shape, tensor.strides, 2)
            for tensor in self.layers
        ]
        self.layout = layout.describe(
            views, num_blocks=blocks, block_size=TOKENS, rank=0, tp_size=1
        )


@pytest.mark.parametrize("order", [TOGETHER, HEADS_APART], ids=["together", "heads apart"])
def test_blocks_of_one_worker_arrive_in_another(case: TransferCase, order: tuple[int, ...]) -> None:
    prefill, decode = Worker(order, BLOCKS, seed=1), Worker(order, BLOCKS // 2, seed=2)
    before = [tensor.copy() for tensor in decode.layers]
    directory = Directory()
    owner, reader = (
        make_engine(directory, name, layout=worker.layout.encode(), settings=case.settings())
        for name, worker in (("owner", prefill), ("reader", decode))
    )
    for engine, worker in ((owner, prefill), (reader, decode)):
        for tensor in worker.memory:
            engine.register(int(tensor.ctypes.data), tensor.nbytes)
    remote_ids, local_ids = [7, 8, 9, 3, 40, 0, 21], [1, 2, 3, 20, 11, 5, 4]

    def planner(info: PeerInfo) -> ReadPlan:
        theirs = layout.KVLayout.decode(info.layout)
        plan: ReadPlan = layout.plan_read(decode.layout, local_ids, theirs, remote_ids)
        return plan

    proof = Credentials("f" * 32, "owner-1", 3, "token", "decode")
    with owner, reader:
        grant = prefill.layout.spans(remote_ids)
        owner.offer(Offer(proof.handoff_id, 3, "token", grant, 1, 30.0, len(remote_ids)))
        succeeds(reader.submit_read(PeerId("owner", 0), proof, planner, 20))
        (ended,) = take_ended(owner)
    assert ended.state is HandoffState.RELEASED
    untouched = [block for block in range(BLOCKS // 2) if block not in local_ids]
    for layer in range(LAYERS):
        assert np.array_equal(decode.layers[layer][local_ids], prefill.layers[layer][remote_ids])
        assert np.array_equal(decode.layers[layer][untouched], before[layer][untouched])
