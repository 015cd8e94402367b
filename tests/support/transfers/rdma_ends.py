"""Both sides of RDMA in one process, without engines: to ask for what engines never ask for."""

from __future__ import annotations

import os
import select
from types import TracebackType
from typing import Self

import numpy as np

from tests.support.transfers.engines import Buffer
from transfer.transports.rdma.handshake import decode_answer, encode_request
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.rdma.lane import Lane
from transfer.transports.rdma.memory import RegisteredMemory
from transfer.transports.rdma.owner import RdmaAttachment
from transfer.transports.rdma.rails import close_rails, open_rails
from transfer.transports.rdma.work import Work
from transfer.types import ReadPlan

NUM_BLOCKS = 16


class Ends:
    """An owner's and a reader's memory, and one lane from the reader to the owner."""

    def __init__(self) -> None:
        self.remote, self.local = Buffer(NUM_BLOCKS), Buffer(NUM_BLOCKS, fill=0)
        self.rails = open_rails(os.environ.get("RDMA_DEVICE", ""), -1)
        self.owner_memory, self.reader_memory = RegisteredMemory(), RegisteredMemory()
        for memory, buffer in ((self.owner_memory, self.remote), (self.reader_memory, self.local)):
            memory.open(self.rails)
            memory.add(buffer.address, buffer.bytes.nbytes)
        self.attachment = RdmaAttachment(self.rails, self.owner_memory)
        self.lanes: list[Lane] = []
        self.lane = self.new_lane()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for lane in self.lanes:
            lane.close()
        self.attachment.close()
        self.owner_memory.close()
        self.reader_memory.close()
        close_rails(self.rails)

    def new_lane(self) -> Lane:
        """Another connected queue pair."""
        lane = Lane(self.rails[0], 0)
        self.lanes.append(lane)
        answer = self.attachment.exchange(encode_request([lane.describe(0)], ()))
        lane.pair_with(decode_answer(answer, 1)[0])
        lane.connect()
        return lane

    def plan(self, blocks: range = range(NUM_BLOCKS)) -> ReadPlan:
        """Every block to where it is at the owner."""
        return ReadPlan(self.local.spans(blocks), self.remote.spans(blocks))

    def read(
        self,
        plan: ReadPlan,
        *,
        local_keys: KeyMap | None = None,
        remote_keys: KeyMap | None = None,
        lane: Lane | None = None,
    ) -> int:
        """Do what ``plan`` says, whether allowed or not; how it ended."""
        lane = lane or self.lane
        work = self.work(plan, local_keys, remote_keys)
        lane.post(work.batches[0], work)
        return until_ended(lane, work.batches[0].size_bytes)

    def work(
        self, plan: ReadPlan, local_keys: KeyMap | None = None, remote_keys: KeyMap | None = None
    ) -> Work:
        """One batch of all that ``plan`` says."""
        return Work(
            [plan],
            self.reader_memory.local if local_keys is None else local_keys,
            self.owner_memory.remote if remote_keys is None else remote_keys,
        )


def until_ended(lane: Lane, size: int) -> int:
    """Wait until ``size`` bytes arrived or something failed; the status."""
    poller = select.poll()
    poller.register(lane.fd, select.POLLIN)
    done = 0
    while True:
        moved, status = lane.reap()
        done += moved
        if status or done >= size:
            return status
        assert poller.poll(30_000), "nothing happened for 30 s"
        lane.rearm()


def with_keys(keys: KeyMap, number: int) -> KeyMap:
    """The same ranges, all with key ``number``."""
    return KeyMap(keys.starts, keys.ends, keys.bases, np.full_like(keys.keys, number))


def stretched(keys: KeyMap, by_bytes: int) -> KeyMap:
    """The same keys, said to reach further than they do."""
    return KeyMap(keys.starts, keys.ends + np.uint64(by_bytes), keys.bases, keys.keys)
