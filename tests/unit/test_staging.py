"""The mirror of KV blocks in host memory, on plain CPU tensors."""

from __future__ import annotations

import itertools

import pytest
import torch

from transfer.connector.staging import HostMirror

BLOCKS, HEADS, TOKENS, CONTENT = 12, 3, 4, 6


def _kv(order: tuple[int, ...], rows_per_block: int, seed: int) -> torch.Tensor:
    """``[B, H, N, C]`` with its axes laid out in memory as ``order`` says."""
    shape = (BLOCKS * rows_per_block, HEADS, TOKENS, CONTENT)
    generator = torch.Generator().manual_seed(seed)
    physical = torch.randn([shape[axis] for axis in order], generator=generator)
    return physical.permute([order.index(axis) for axis in range(4)])


@pytest.mark.parametrize("rows_per_block", [1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_blocks_cross_by_way_of_two_mirrors(order: tuple[int, ...], rows_per_block: int) -> None:
    owner_side = [_kv(order, rows_per_block, seed) for seed in (1, 2)]
    reader_side = [_kv(order, rows_per_block, seed) for seed in (3, 4)]
    untouched = [tensor.clone() for tensor in reader_side]
    owner, reader = HostMirror(owner_side, BLOCKS), HostMirror(reader_side, BLOCKS)
    source, target = [7, 2, 11], [0, 5, 3]

    owner.save(source)
    rows = [
        (s * rows_per_block + k, t * rows_per_block + k)
        for s, t in zip(source, target, strict=True)
        for k in range(rows_per_block)
    ]
    for here, there in zip(owner.tensors, reader.tensors, strict=True):
        for s, t in rows:
            there[t] = here[s]
    reader.load(target)

    changed = {t for _, t in rows}
    for sent, got, before in zip(owner_side, reader_side, untouched, strict=True):
        for s, t in rows:
            assert torch.equal(got[t], sent[s])
        for row in set(range(BLOCKS * rows_per_block)) - changed:
            assert torch.equal(got[row], before[row])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_mirror_has_the_same_axis_order(order: tuple[int, ...]) -> None:
    tensor = _kv(order, 1, 0)
    (mirror,) = HostMirror([tensor], BLOCKS).tensors
    assert mirror.shape == tensor.shape
    assert mirror.stride() == tensor.stride()
    assert mirror.data_ptr() != tensor.data_ptr()


def test_what_is_not_saved_does_not_show() -> None:
    tensor = _kv((0, 1, 2, 3), 1, 0)
    mirror = HostMirror([tensor], BLOCKS)
    mirror.save([4])
    assert torch.equal(mirror.tensors[0][4], tensor[4])
    assert not mirror.tensors[0][5].any()
