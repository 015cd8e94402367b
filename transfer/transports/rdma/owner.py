"""The owner's side: queue pairs that readers read through while they are connected."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from transfer.errors import Phase, TransportUnavailable
from transfer.transports.base import Attachment, Listener
from transfer.transports.rdma.handshake import MAX_PAIRS, End, decode_request, encode_answer
from transfer.transports.rdma.local_end import MAX_READS, LocalEnd
from transfer.transports.rdma.memory import RegisteredMemory
from transfer.transports.rdma.rails import Rail
from transfer.transports.rdma.verbs.completion_queue import CompletionQueue
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.types import ReaderProcess, SpanArray

logger = logging.getLogger(__name__)


class RdmaListener(Listener):
    """Lets readers attach over their control connections; has no port of its own."""

    def __init__(
        self, rails: list[Rail], memory: RegisteredMemory, on_close: Callable[[], None]
    ) -> None:
        self._rails = rails
        self._memory = memory
        self._on_close = on_close

    def __repr__(self) -> str:
        return f"<RdmaListener {self.address}>"

    @property
    def address(self) -> str:
        return f"rdma://{','.join(map(str, self._rails))}"

    def attach(self, reader: ReaderProcess) -> Attachment:
        return RdmaAttachment(self._rails, self._memory)

    def close(self) -> None:
        self._on_close()


class RdmaAttachment(Attachment):
    """The queue pairs of one reader's control connection. Thread-safe."""

    def __init__(self, rails: list[Rail], memory: RegisteredMemory) -> None:
        self._rails = rails
        self._memory = memory
        self._lock = threading.Lock()
        self._closed = False
        self._ends: dict[int, LocalEnd] = {}
        # Nothing is ever asked for on this side, so nothing ever completes.
        self._completions: dict[int, CompletionQueue] = {}

    def __repr__(self) -> str:
        return f"<RdmaAttachment {len(self._ends)} queue pairs>"

    def exchange(self, request: bytes | bytearray) -> bytes:
        """Connect a queue pair to each of the reader's."""
        wanted, given_up = decode_request(request)
        with self._lock:
            self._give_up(given_up)
            if self._closed or len(self._ends) + len(wanted) > MAX_PAIRS:
                raise TransportUnavailable(
                    f"the reader has its {len(self._ends)} queue pairs", phase=Phase.CONNECT
                )
            before = set(self._ends)
            connected = False
            try:
                answer = encode_answer([self._connect(peer) for peer in wanted])
                connected = True
                return answer
            except VerbsError as error:
                raise TransportUnavailable(
                    f"the owner cannot connect a queue pair: {error}", phase=Phase.CONNECT
                ) from error
            finally:
                if not connected:  # the reader never learns their numbers
                    self._give_up(self._ends.keys() - before)

    def keys(self, spans: SpanArray) -> bytes:
        """Remote keys of the regions that ``spans`` lie in."""
        known = self._memory.remote
        if not known.cover(spans):
            raise TransportUnavailable(
                "the owner's devices did not take the memory that is to be read", phase=Phase.READ
            )
        return known.within(spans).encode()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with ExitStack() as closing:
                # Called from the last to the first, each whether or not another one fails.
                for completions in self._completions.values():
                    closing.callback(completions.close)
                for number in list(self._ends):
                    closing.callback(self._drop, number)
            self._completions = {}

    def _connect(self, peer: End) -> End:
        number = peer.rail % len(self._rails)
        rail = self._rails[number]
        if rail.port.ethernet != peer.ethernet:
            raise TransportUnavailable(
                f"the owner's {rail} is {_link(rail.port.ethernet)}, "
                f"the reader's {_link(peer.ethernet)}",
                phase=Phase.CONNECT,
            )
        completions = self._completions.get(number)
        if completions is None:
            completions = rail.device.completion_queue(1, events=False)
            self._completions[number] = completions
        reads = max(1, min(MAX_READS, rail.device.limits.reads_served))
        end = LocalEnd(rail, completions, 1, reads)
        told = end.describe(number)
        self._ends[told.name] = end
        end.connect(peer)
        return told

    def _give_up(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            try:
                self._drop(number)
            except VerbsError as error:  # no affair of what is asked for now
                logger.warning("a reader's queue pair stays open: %s", error)

    def _drop(self, number: int) -> None:
        end = self._ends.pop(number, None)
        if end is not None:
            end.pair.close()


def _link(ethernet: bool) -> str:
    return "Ethernet" if ethernet else "InfiniBand"
