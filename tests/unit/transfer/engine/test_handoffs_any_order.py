"""What holds for hand-offs, whatever happens to them in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tests.support.transfers.handoffs import (
    READER,
    TTL_S,
    Clock,
    begin,
    claim,
    live,
    make_table,
    offer,
)
from transfer.engine.handoff import Permit
from transfer.errors import HandoffRefused


class Lives(RuleBasedStateMachine):
    """Whatever happens in whatever order: pinned means confirmed, and every end is told once."""

    offered = Bundle("offered")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = make_table(self.clock)
        self.names: list[str] = []
        self.taken: list[str] = []
        self.permits: dict[Permit, str] = {}

    @rule(target=offered, readers=st.integers(1, 2))
    def offer(self, readers: int) -> str:
        self.names.append(str(len(self.names)))
        self.table.offer(offer(self.names[-1], readers=readers))
        return self.names[-1]

    @rule(name=offered, reader=st.sampled_from("ab"))
    def begin(self, name: str, reader: str) -> None:
        try:
            permit = begin(self.table, claim(name, reader=reader))
        except HandoffRefused:
            return
        assert name not in self.taken
        self.permits[permit] = name

    @rule()
    def end_read(self) -> None:
        if self.permits:
            permit = next(iter(self.permits))
            del self.permits[permit]
            self.table.end_read(permit)

    @rule(name=offered, reader=st.sampled_from("abc"), used=st.booleans())
    def release(self, name: str, reader: str, used: bool) -> None:
        alive = {one.offer.handoff_id for one in live(self.table)}
        try:
            self.table.release(claim(name, reader=reader), used=used)
        except HandoffRefused:
            return
        if name not in alive:  # then this reader had released while it was
            self.table.release(claim(name, reader=reader), used=False)

    @rule(name=offered)
    def renew(self, name: str) -> None:
        try:
            self.table.renew(claim(name))
        except HandoffRefused:
            return
        assert name not in self.taken

    @rule(name=offered)
    def abort(self, name: str) -> None:
        self.table.abort(name, "")

    @rule()
    def reader_dies(self) -> None:
        self.table.reader_left(READER.peer)

    @rule(seconds=st.floats(0.1, TTL_S))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for name in self.names:
            self.table.expire(name)

    @rule()
    def take(self) -> None:
        for ended in self.table.take_ended():
            assert ended.handoff_id not in self.taken
            assert ended.handoff_id not in self.permits.values()
            self.taken.append(ended.handoff_id)

    @invariant()
    def live_and_taken_are_apart(self) -> None:
        assert not {one.offer.handoff_id for one in live(self.table)} & set(self.taken)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
