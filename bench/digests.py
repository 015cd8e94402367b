"""What digests cost: milliseconds of one core for 1,000 tokens of the demo model's KV.

Run alone on a quiet machine::

    OMP_NUM_THREADS=1 python -m bench.digests
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import torch

from transfer.connector.kv.digests import BlockDigests, unit_tokens
from transfer.connector.kv.layout import LayerView, describe
from transfer.connector.kv.packing import Packing, cpu_packing, token_major
from transfer.connector.kv.pairing import Stretch, digest_units

LAYERS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BLOCKS = 30, 3, 64, 32, 300
PROMPT_TOKENS = 3000
ROUNDS = 15
PACKINGS = {
    "CPU, float and AVX": cpu_packing("vec", HEAD_SIZE, 2),
    "CPU, AMX": cpu_packing("amx", HEAD_SIZE, 2),
    "token by token": token_major(4 * HEAD_SIZE),
}


def milliseconds(packing: Packing) -> float:
    """Median over rounds of processor time, for 1,000 tokens on one side."""
    memory = torch.randn(LAYERS, BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE).to(torch.bfloat16)
    layers = list(memory.unbind(0))
    sizes = (BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    b, h, n, c = (2 * stride for stride in layers[0].stride())
    layout = describe(
        [LayerView(layer.data_ptr(), sizes, (b, h, n, c), 2) for layer in layers],
        packing,
        axes="BHNC",
        num_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        total_heads=KV_HEADS,
        rank=0,
        tp_size=1,
    )
    layout = replace(layout, digest_tokens=unit_tokens(BLOCK_SIZE))
    digests = BlockDigests(layers, layout)
    block_ids = random.Random(1).sample(range(BLOCKS), -(-PROMPT_TOKENS // BLOCK_SIZE))
    units = digest_units(layout, Stretch(0, PROMPT_TOKENS, block_ids))
    digests.write(units)
    spent = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        if not digests.agree(units):
            raise RuntimeError("memory changed under the benchmark")
        spent.append(time.thread_time() - began)
    return statistics.median(spent) * 1e6 / PROMPT_TOKENS


def main() -> None:
    torch.set_num_threads(1)
    for name, packing in PACKINGS.items():
        print(f"{name}: {milliseconds(packing):.1f} ms for 1,000 tokens on each side")


if __name__ == "__main__":
    main()
