"""What a connector's worker is made of, played by the test: a path of blocks and an engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from transfer.connector.memory.device_event import DeviceEvent
from transfer.connector.working.block_path import BlockPath, PromptBlocks
from transfer.engine.handle import TransferHandle
from transfer.engine.handoff import EndedHandoff, Offer
from transfer.errors import DigestMismatch
from transfer.types import Credentials, PeerId, Planner


class ScriptedPath(BlockPath):
    """Writes its steps down; a test ends those that take their time."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.steps: list[str] = []
        self.blocks: list[PromptBlocks] = []
        self.future: Future[None] = Future()
        self.then: Callable[[], object] = lambda: None
        self.mismatch: DigestMismatch | None = None

    def save(self, blocks: PromptBlocks, then: Callable[[], object]) -> Future[None]:
        self.steps.append("save")
        self.blocks.append(blocks)
        self.then = then
        return self.future

    def mark(self) -> DeviceEvent:
        self.steps.append("mark")
        return super().mark()

    def before_read(self, mark: DeviceEvent) -> None:
        self.steps.append("before")

    def after_read(self, blocks: PromptBlocks, mark: DeviceEvent, *, check: bool) -> Future[None]:
        self.steps.append(f"after, check={check}")
        self.blocks.append(blocks)
        return self.future

    def finish_read(self, blocks: PromptBlocks, *, check: bool) -> None:
        self.steps.append(f"finish, check={check}")
        if self.mismatch is not None:
            raise self.mismatch

    def close(self) -> None:
        self.steps.append("close")


class ScriptedEngine:
    """Takes offers and reads; a test says how they go on."""

    def __init__(self) -> None:
        self.offered: list[Offer] = []
        self.ready: list[str] = []
        self.aborted: list[str] = []
        self.ended: list[EndedHandoff] = []
        self.handles: list[TransferHandle] = []
        self.planners: list[Planner] = []
        self.released: list[Credentials] = []
        self.waits_s: list[float] = []
        self.healthy = True
        self.registered = True
        self.overwritten = 0

    def offer(self, offer: Offer) -> None:
        self.offered.append(offer)

    def make_ready(self, handoff_id: str) -> bool:
        self.ready.append(handoff_id)
        return True

    def abort(self, handoff_id: str, reason: str) -> bool:
        self.aborted.append(handoff_id)
        return True

    def take_ended(self) -> list[EndedHandoff]:
        ended, self.ended = self.ended, []
        return ended

    def submit_read(
        self, owner: PeerId, credentials: Credentials, planner: Planner, deadline_s: float
    ) -> TransferHandle:
        self.handles.append(TransferHandle(owner, credentials.handoff_id, deadline_s))
        self.planners.append(planner)
        return self.handles[-1]

    def wait_for_end(self, timeout_s: float) -> bool:
        self.waits_s.append(timeout_s)
        return True

    def submit_release(self, owner: PeerId, credentials: Credentials, used: bool) -> None:
        self.released.append(credentials)
