"""The way of KV blocks through slots in host memory, on plain CPU tensors."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

from tests.support.connector.staged_memory import BLOCK, MODEL, StagedMemory
from transfer.connector.kv.digests import BlockDigests
from transfer.connector.memory.copy_thread import CopyThread
from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.memory.host_blocks import HostBlocks
from transfer.connector.working.block_path import PromptBlocks
from transfer.connector.working.staged import STEP_BLOCKS, Staged
from transfer.errors import DigestMismatch

BLOCKS, HEADS, TOKENS, CONTENT = 12, 3, 4, 6
SLOTS = 5


def _kv(order: tuple[int, ...], rows_per_block: int, seed: int) -> torch.Tensor:
    """``[B, H, N, C]`` with its axes laid out in memory as ``order`` says."""
    shape = (BLOCKS * rows_per_block, HEADS, TOKENS, CONTENT)
    generator = torch.Generator().manual_seed(seed)
    physical = torch.randn([shape[axis] for axis in order], generator=generator)
    return physical.permute([order.index(axis) for axis in range(4)])


@pytest.mark.parametrize("rows_per_block", [1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("slots", [[1, 2, 3], [4, 0, 1]])
def test_blocks_cross_by_way_of_slots(
    order: tuple[int, ...], rows_per_block: int, slots: list[int]
) -> None:
    owner_side = [_kv(order, rows_per_block, seed) for seed in (1, 2)]
    reader_side = [_kv(order, rows_per_block, seed) for seed in (3, 4)]
    untouched = [tensor.clone() for tensor in reader_side]
    owner, reader = (HostBlocks(side, BLOCKS, SLOTS) for side in (owner_side, reader_side))
    source, arrived, target = [7, 2, 11], [2, 4, 0], [0, 5, 3]

    owner.save(source, slots)
    each = range(rows_per_block)
    for here, there in zip(owner.tensors, reader.tensors, strict=True):
        for s, t in zip(slots, arrived, strict=True):
            for k in each:
                there[t * rows_per_block + k] = here[s * rows_per_block + k]
    reader.load(target, arrived)

    rows = [
        (s * rows_per_block + k, t * rows_per_block + k)
        for s, t in zip(source, target, strict=True)
        for k in each
    ]
    changed = {t for _, t in rows}
    for sent, got, before in zip(owner_side, reader_side, untouched, strict=True):
        for s, t in rows:
            assert torch.equal(got[t], sent[s])
        for row in set(range(BLOCKS * rows_per_block)) - changed:
            assert torch.equal(got[row], before[row])


@pytest.mark.parametrize("rows_per_block", [1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_slots_have_the_same_axis_order(order: tuple[int, ...], rows_per_block: int) -> None:
    tensor = _kv(order, rows_per_block, 0)
    (host,) = HostBlocks([tensor], BLOCKS, SLOTS).tensors
    assert host.shape == (SLOTS * rows_per_block, *tensor.shape[1:])
    assert host.permute(order).is_contiguous()
    assert host.data_ptr() != tensor.data_ptr()


def test_what_is_not_saved_does_not_show() -> None:
    tensor = _kv((0, 1, 2, 3), 1, 0)
    blocks = HostBlocks([tensor], BLOCKS, SLOTS)
    blocks.save([4], [2])
    assert torch.equal(blocks.tensors[0][2], tensor[4])
    assert not blocks.tensors[0][[0, 1, 3, 4]].any()


class Side(StagedMemory):
    """A KV cache with slots, and the thread that copies between them."""

    def __init__(self) -> None:
        super().__init__(num_blocks=3 * STEP_BLOCKS, num_slots=2 * STEP_BLOCKS)
        self.ended = threading.Semaphore(0)
        self.path = Staged(
            self.blocks, self.layout, self.digests, "test", on_end=self.ended.release
        )

    def save(self, block_ids: list[int], slots: list[int]) -> tuple[Future[None], list[str]]:
        """Begins; the second is not empty once readers were let in."""
        let_in: list[str] = []
        blocks = PromptBlocks(block_ids, slots, range(BLOCK * len(slots)))
        return self.path.save(blocks, then=lambda: let_in.append("readers")), let_in

    def load(self, block_ids: list[int], slots: list[int], *, check: bool = True) -> Future[None]:
        tokens = range(2 * BLOCK, 2 * BLOCK + BLOCK * len(slots) - 3)
        blocks = PromptBlocks(block_ids, slots, tokens)
        return self.path.after_read(blocks, self.path.mark(), check=check)


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.blocks.go.set()
    made.path.close()
    assert not [thread for thread in threading.enumerate() if "baton-copy" in thread.name]


@pytest.mark.parametrize("count", [1, STEP_BLOCKS, STEP_BLOCKS + 1, 2 * STEP_BLOCKS])
def test_a_prompt_goes_out_and_comes_back_in_steps(side: Side, count: int) -> None:
    values = MODEL.values(16 * count)
    slots = list(range(count))
    side.pool.write(range(count), values)

    copy, let_in = side.save(list(range(count)), slots)
    copy.result(10)
    assert let_in == ["readers"]
    side.load(list(range(count, 0, -1)), slots).result(10)

    assert torch.equal(side.pool.read(range(count, 0, -1), 16 * count), values)
    assert max(side.blocks.steps) <= STEP_BLOCKS
    assert sum(side.blocks.steps) == 2 * count
    assert side.ended.acquire(timeout=10)
    assert side.ended.acquire(timeout=10)


def test_nobody_is_let_in_before_the_last_block_is_there(side: Side) -> None:
    side.blocks.hold()
    copy, let_in = side.save(list(range(40)), list(range(40)))
    assert side.blocks.began.wait(10)
    assert (copy.done(), let_in) == (False, [])

    side.blocks.go.set()
    copy.result(10)

    assert let_in == ["readers"]


def test_digests_are_there_before_anybody_is_let_in(side: Side) -> None:
    seen = []
    expected = BlockDigests(side.pool.layers, dataclasses.replace(side.layout, num_blocks=96))
    expected.write(torch.arange(96).numpy())
    copy = side.path.save(
        PromptBlocks([50, 7], [3, 9], range(32)),
        then=lambda: seen.append(side.digests.table[[3, 9]].clone()),
    )
    copy.result(10)
    assert torch.equal(seen[0], expected.table[[50, 7]])


def test_a_short_prompt_overtakes_a_long_one(side: Side) -> None:
    side.blocks.hold()
    long, _ = side.save(list(range(2 * STEP_BLOCKS)), list(range(2 * STEP_BLOCKS)))
    short, _ = side.save([90], [0])
    long_was_done = []
    short.add_done_callback(lambda _: long_was_done.append(long.done()))

    side.blocks.go.set()
    long.result(10)
    short.result(10)

    assert long_was_done == [False]
    assert side.blocks.steps == [STEP_BLOCKS, 1, STEP_BLOCKS]


@pytest.mark.parametrize("changed", [0, 39])
def test_damaged_blocks_never_reach_the_device(side: Side, changed: int) -> None:
    slots = list(range(40))
    side.save(slots, slots)[0].result(10)
    before = side.pool.copy()
    side.blocks.tensors[1][changed, 0, 0, 0] ^= 4

    copy = side.load(list(range(50, 90)), slots)

    assert isinstance(copy.exception(10), DigestMismatch)
    for tensor, then in zip(side.pool.layers, before, strict=True):
        assert torch.equal(tensor, then)
    # An owner without digests is believed.
    assert side.load(list(range(50, 90)), slots, check=False).exception(10) is None


def test_a_copy_that_fails_says_so_and_the_next_one_works(side: Side) -> None:
    side.blocks.error = RuntimeError("the device is lost")
    copy, let_in = side.save([1], [1])
    assert str(copy.exception(10)) == "the device is lost"
    assert let_in == []
    assert side.ended.acquire(timeout=10)

    side.blocks.error = None

    assert side.save([1], [1])[0].exception(10) is None


def test_copies_that_are_not_over_end_with_the_thread(side: Side) -> None:
    side.blocks.hold()
    long, let_in = side.save(list(range(2 * STEP_BLOCKS)), list(range(2 * STEP_BLOCKS)))
    short, _ = side.save([90], [0])
    assert side.blocks.began.wait(10)
    threading.Timer(0.05, side.blocks.go.set).start()

    side.path.close()

    assert long.exception(0) is not None
    assert short.exception(0) is not None
    assert let_in == []
    assert side.save([1], [1])[0].exception(0) is not None


def test_memory_that_vllm_made_for_inference_is_copied() -> None:
    with torch.inference_mode():
        tensor = _kv((0, 2, 1, 3), 1, 0).clone()
        side = Side()
        blocks = HostBlocks([tensor], BLOCKS, SLOTS)
    path = Staged(blocks, side.layout, None, "test", on_end=lambda: None)
    before = tensor[4].clone()

    path.save(PromptBlocks([4], [2], range(16)), then=lambda: None).result(10)
    there = PromptBlocks([9], [2], range(16))
    path.after_read(there, path.mark(), check=False).result(10)
    path.close()
    side.save([1], [1])[0].result(10)
    side.path.close()

    assert torch.equal(tensor[9], before)


class StreamStandIn:
    """A device's stream, as far as copies use it: writes down what is queued."""

    def __init__(self, device: torch.device | str = "model's") -> None:
        self.queued: list[object] = []

    def record_event(self) -> object:
        self.queued.append("event")
        return self.queued[-1]

    def wait_event(self, event: object) -> None:
        self.queued.append(("wait for", event))


def test_copies_have_a_stream_of_their_own_that_waits_for_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = threading.local()
    here.stream = StreamStandIn()
    streams = [here.stream]

    def set_stream(stream: StreamStandIn) -> None:
        here.stream = stream
        streams.append(stream)

    monkeypatch.setattr(torch, "Stream", StreamStandIn)
    monkeypatch.setattr(torch.accelerator, "set_stream", set_stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: here.stream)
    device = torch.device("cuda", 0)
    copies = CopyThread("test", device, on_end=lambda: None)
    event = DeviceEvent(device)

    def steps() -> Iterator[None]:
        event.wait()
        yield

    for _ in range(2):
        copies.submit(steps()).result(10)
    copies.close()

    models, own = streams
    assert models.queued == ["event"]
    assert own.queued == [("wait for", "event")] * 2
