"""A model that is through with its work when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from transfer.connector.kv.digests import BlockDigests
from transfer.connector.kv.layout import KVLayout
from transfer.connector.working.in_place import InPlace


@dataclass
class HeldEvent:
    """Stands in for a device's event: ``passed`` is the test's, ``waited`` says that somebody
    does."""

    passed: threading.Event = field(default_factory=threading.Event)
    waited: threading.Event = field(default_factory=threading.Event)

    def synchronize(self) -> None:
        self.waited.set()
        if not self.passed.wait(20):
            raise TimeoutError("the test never let the model go on")


class HeldInPlace(InPlace):
    """All its marks are ``held``."""

    def __init__(
        self,
        layout: KVLayout,
        on_end: Callable[[], None],
        name: str,
        digests: BlockDigests | None = None,
    ) -> None:
        super().__init__(torch.device("cpu"), layout, digests, name, on_end)
        self.held = HeldEvent()

    def mark(self) -> HeldEvent:  # type: ignore[override]  # a stand-in for a device's event
        return self.held
