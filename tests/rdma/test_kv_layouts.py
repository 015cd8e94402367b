"""A hand-off between two KV memories of the shapes that vLLM's attention backends use."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import Directory, make_engine, succeeds, take_ended
from transfer.connector.kv import layout, packing, pairing
from transfer.engine.handoff import HandoffState, Offer
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 4, 48, 2, 16, 128

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
        views = []
        for tensor in self.layers:
            block, head, token, content = tensor.strides
            strides = (block, head, token, content)
            views.append(layout.LayerView(int(tensor.ctypes.data), logical, strides, 2))
        self.layout = layout.describe(
            views,
            packing.token_major(2 * CONTENT),
            axes="".join("BHNC"[axis] for axis in order),
            num_blocks=blocks,
            block_size=TOKENS,
            total_heads=HEADS,
            rank=0,
            tp_size=1,
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
        into = pairing.Stretch(0, len(local_ids) * TOKENS, local_ids)
        plan: ReadPlan = pairing.plan_read(
            decode.layout, into, theirs, remote_ids, decode.layout.heads
        )
        return plan

    proof = Credentials("f" * 32, "owner-1", 3, "secret", "decode")
    with owner, reader:
        grant = pairing.block_spans_of(prefill.layout, remote_ids)
        owner.offer(Offer(proof.handoff_id, 3, "secret", grant, 1, 30.0))
        succeeds(reader.submit_read(PeerId("owner", 0), proof, planner, 20))
        (ended,) = take_ended(owner)
    assert ended.state is HandoffState.RELEASED
    untouched = [block for block in range(BLOCKS // 2) if block not in local_ids]
    for layer in range(LAYERS):
        assert np.array_equal(decode.layers[layer][local_ids], prefill.layers[layer][remote_ids])
        assert np.array_equal(decode.layers[layer][untouched], before[layer][untouched])
