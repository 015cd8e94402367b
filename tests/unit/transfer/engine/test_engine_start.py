"""What an engine has done by the time that it runs, or cannot, with a listener that only waits."""

from __future__ import annotations

import pytest

from tests.support.transfers.engines import Directory, make_engine
from transfer.engine import engine as engine_module
from transfer.engine.timer import DeadlineTimer
from transfer.errors import RegistrationError, TransferCancelled
from transfer.transports.base import Listener
from transfer.transports.registry import Transports


class Waiting(Listener):
    closed = 0

    @property
    def address(self) -> str:
        return "tcp://192.0.2.1:7"

    def close(self) -> None:
        self.closed += 1


def no_more_threads(_: DeadlineTimer) -> None:
    raise RuntimeError("can't start new thread")


def test_nobody_is_served_by_an_engine_that_cannot_start_its_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = Waiting()
    monkeypatch.setattr(Transports, "listen", lambda *_: [waiting])
    monkeypatch.setattr(DeadlineTimer, "start", no_more_threads)
    engine = make_engine(Directory(), "owner")
    with pytest.raises(RuntimeError, match="new thread"):
        engine.start()
    assert waiting.closed == 1
    assert engine.addresses == ()
    with pytest.raises(TransferCancelled, match="closed"):
        engine.start()


def test_huge_pages_are_asked_for_before_a_device_holds_the_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        engine_module, "prefer_huge_pages", lambda *range_: done.append(("advised", *range_))
    )
    monkeypatch.setattr(
        Transports, "add_memory", lambda _, *range_: done.append(("held", *range_[:2]))
    )
    engine = make_engine(Directory(), "owner")
    engine.register(1 << 40, 1 << 30)
    assert done == [("advised", 1 << 40, 1 << 30), ("held", 1 << 40, 1 << 30)]
    with pytest.raises(RegistrationError, match="not a range of memory"):
        engine.register(1 << 40, -1)
    assert len(done) == 2
