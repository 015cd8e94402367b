"""What becomes of a peer's links when its reader is dismissed, without any I/O."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from tests.support.processes.waiting import wait_until
from transfer.engine.memory import MemoryTable
from transfer.engine.reading.budget import ByteBudget
from transfer.engine.reading.notices import Notice
from transfer.engine.reading.owner_links import Link, OwnerLinks
from transfer.engine.reading.reader import PeerReader
from transfer.errors import Phase, TransferCancelled
from transfer.settings import TransferSettings
from transfer.types import Credentials, PeerId


class OpenLinks:
    def __init__(self) -> None:
        self.closed = False

    def use(self, credentials: Credentials, deadline: float) -> AbstractContextManager[Link]:
        return nullcontext(cast(Link, None))

    def close(self) -> None:
        self.closed = True


def over() -> TransferCancelled:
    return TransferCancelled("over", phase=Phase.READ)


def make_reader(links: OpenLinks) -> PeerReader:
    return PeerReader(
        PeerId("owner", 0),
        cast(OwnerLinks, links),
        cast(MemoryTable, None),
        ByteBudget(1),
        TransferSettings(),
    )


def notice(send: Any) -> Notice:
    credentials = [Credentials("h", "i", 1, "secret", "r")]
    return Notice("release of h", credentials, send, time.monotonic() + 10)


def test_links_are_closed_with_a_quiet_reader_whose_threads_linger() -> None:
    links, sent = OpenLinks(), threading.Event()
    reader = make_reader(links)
    reader.notify(notice(lambda *_: sent.set()))
    assert sent.wait(5)
    assert wait_until(lambda: reader.quiet)
    assert reader.alive
    reader.shut(over)
    assert links.closed
    reader.join(5)


def test_links_stay_while_something_is_told() -> None:
    links, told = OpenLinks(), threading.Event()
    reader = make_reader(links)
    reader.notify(notice(lambda *_: told.wait(5)))
    reader.shut(over)
    assert not links.closed
    told.set()
    reader.join(5)
    assert links.closed
