"""The ways of blocks that stay in the KV cache: what waits for the model, what is compared."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.connector.held_event import HeldInPlace
from tests.support.connector.kv_pools import make_pool
from tests.support.connector.staged_memory import BLOCK, MODEL
from transfer.connector.kv.digests import BlockDigests, unit_tokens
from transfer.connector.working.block_path import PromptBlocks
from transfer.connector.working.direct import Direct
from transfer.connector.working.in_place import InPlace
from transfer.errors import DigestMismatch

CPU = torch.device("cpu")
BLOCKS = PromptBlocks([5, 2, 7], [5, 2, 7], range(BLOCK, 4 * BLOCK - 3))


class Cache:
    """A KV cache with digests."""

    def __init__(self) -> None:
        self.pool = make_pool(MODEL, KVCacheLayout.LBHNC, num_blocks=8, kernel_tokens=BLOCK)
        layout = dataclasses.replace(self.pool.layout, digest_tokens=unit_tokens(BLOCK))
        self.digests = BlockDigests(self.pool.layers, layout)
        self.layout = dataclasses.replace(layout, digest_base=self.digests.memory[0])

    @property
    def has_digests(self) -> bool:
        """Whether the table has what the blocks of the prompt have."""
        expected = BlockDigests(self.pool.layers, self.layout)
        expected.write(torch.arange(8).numpy())
        return torch.equal(self.digests.table[[5, 2, 7]], expected.table[[5, 2, 7]])


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def held(cache: Cache) -> Iterator[HeldInPlace]:
    path = HeldInPlace(cache.layout, lambda: None, "test", cache.digests)
    yield path
    path.held.passed.set()
    path.close()
    assert not [thread for thread in threading.enumerate() if "baton-wait" in thread.name]


def test_what_the_model_computed_on_the_host_is_let_out_at_once_with_its_digests(
    cache: Cache,
) -> None:
    path = Direct(CPU, cache.layout, cache.digests)
    seen: list[bool] = []

    saved = path.save(BLOCKS, then=lambda: seen.append(cache.has_digests))

    assert (saved.done(), saved.exception(), seen) == (True, None, [True])


def test_what_a_device_computes_is_let_out_when_it_is_written(
    cache: Cache, held: HeldInPlace
) -> None:
    seen: list[bool] = []
    saved = held.save(BLOCKS, then=lambda: seen.append(cache.has_digests))
    assert held.held.waited.wait(5)
    assert (saved.done(), seen) == (False, [])

    held.held.passed.set()

    assert saved.result(5) is None
    assert seen == [True]


def test_nothing_is_let_out_of_a_path_that_is_closed(cache: Cache) -> None:
    path = InPlace(CPU, cache.layout, None, "test", lambda: None)
    path.close()
    seen: list[str] = []

    assert path.save(BLOCKS, then=lambda: seen.append("readers")).exception(5) is not None
    assert seen == []


def test_bytes_are_asked_for_when_the_device_is_through(held: HeldInPlace) -> None:
    asked = threading.Event()

    def ask() -> None:
        held.before_read(held.held)  # type: ignore[arg-type]  # a stand-in for a device's event
        asked.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert held.held.waited.wait(5)
    assert not asked.is_set()

    held.held.passed.set()

    assert asked.wait(5)
    thread.join()


@pytest.mark.parametrize("kind", [Direct, InPlace])
@pytest.mark.parametrize("changed", [5, 2, 7])
def test_damage_is_found_where_it_arrived(cache: Cache, kind: type[Direct], changed: int) -> None:
    path: Direct
    if kind is InPlace:
        path = InPlace(CPU, cache.layout, cache.digests, "test", lambda: None)
    else:
        path = Direct(CPU, cache.layout, cache.digests)
    path.save(BLOCKS, then=lambda: None).result(5)
    assert path.after_read(BLOCKS, path.mark(), check=True).result(0) is None
    path.finish_read(BLOCKS, check=True)

    cache.pool.layers[1][changed, 0, 0, 0] ^= 4

    with pytest.raises(DigestMismatch, match="arrived changed"):
        path.finish_read(BLOCKS, check=True)
    # An owner without digests is believed.
    path.finish_read(BLOCKS, check=False)
    path.close()
