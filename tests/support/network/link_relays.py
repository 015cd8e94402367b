"""Stands between decode and prefill workers: cuts, swallows or slows what passes, etcd unaffected.

:class:`WorkerRelays` has all processes of an application connect to a relay instead of a prefill
worker, so that it can be partitioned on one machine without touching its network or its etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Coroutine, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.support.processes.world import World
from transfer.addressing import parse_address
from transfer.discovery.etcd_client import EtcdUnavailable
from transfer.discovery.etcd_connector import EtcdConnector
from transfer.discovery.listing import KeyValue
from transfer.discovery.record import workers_prefix
from transfer.discovery.settings import EtcdSettings

_CHUNK_BYTES = 64 << 10
_BULK_BYTES = 16 << 10
"""A piece as long as this holds blocks, and in its middle nothing else."""
_LOOK_EVERY_S = 0.2
_Answer = TypeVar("_Answer")


class Link(Enum):
    """What a relay does with bytes."""

    OPEN = "open"
    SILENT = "silent"
    """Nothing passes and nobody is told, as when packets are dropped."""
    REFUSED = "refused"
    """Connections are cut, new ones at once."""


class Relay:
    """Passes the connections of one address on. All of its methods run on its event loop."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._link = Link.OPEN
        self._open = asyncio.Event()
        self._open.set()
        self._bytes_per_s: float | None = None
        self._corrupt = False
        self._turn = asyncio.Lock()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.passed_bytes = 0

    async def listen(self) -> str:
        """Begin; gives the address to connect to."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def set(self, link: Link, bytes_per_s: float | None, corrupt: bool) -> None:
        """Change what passes from now on, how fast from the target, and with which faults."""
        self._link, self._bytes_per_s, self._corrupt = link, bytes_per_s, corrupt
        if link is Link.SILENT:
            self._open.clear()
        else:
            self._open.set()
        if link is Link.REFUSED:
            self._cut()

    async def close(self) -> None:
        """Cut everything and end."""
        self._link = Link.REFUSED
        self._open.set()
        if self._server is not None:
            self._server.close()
        self._cut()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        try:
            await self._open.wait()
            if self._link is Link.REFUSED:
                return
            with contextlib.suppress(OSError):
                upstream, downstream = await asyncio.open_connection(*self._target)
                ends.add(downstream)
                self._writers |= ends
                await asyncio.gather(
                    self._pump(reader, downstream, limited=False),
                    self._pump(upstream, writer, limited=True),
                )
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, limited: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                await self._open.wait()
                if limited:
                    await self._paced(len(data))
                    self.passed_bytes += len(data)
                    if self._corrupt and len(data) >= _BULK_BYTES:
                        data = _damaged(data)
                sink.write(data)
                await sink.drain()
        sink.close()

    async def _paced(self, count: int) -> None:
        if self._bytes_per_s is not None:
            async with self._turn:  # all connections share the rate
                await asyncio.sleep(count / (self._bytes_per_s or count))


def _damaged(data: bytes) -> bytes:
    """With one bit turned over in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1 :]


class Relays:
    """Relays on a thread of their own; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        # By the address that each passes on to, and the one to connect to instead.
        self._relays: dict[str, Relay] = {}
        self._instead: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for relay in self._relays.values():
            self._run(relay.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def passed_bytes(self) -> int:
        """Bytes that came from the targets through all relays so far."""
        return sum(relay.passed_bytes for relay in self._relays.values())

    def instead_of(self, address: str) -> str:
        """The address of the relay to ``address``, which is made if there is none."""
        if address not in self._relays:
            target = parse_address(address)
            relay = Relay((target.host, target.port))
            self._instead[address] = self._run(relay.listen())
            self._relays[address] = relay
        return self._instead[address]

    def set(
        self,
        link: Link,
        bytes_per_s: float | None = None,
        corrupt: bool = False,
        *,
        newest_only: bool = False,
    ) -> None:
        """Change all links, or the one made last; not those that are made later."""
        relays = list(self._relays.values())
        for relay in relays[-1:] if newest_only else relays:
            self._run(relay.set(link, bytes_per_s, corrupt))

    def _run(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


class WorkerRelays(Relays):
    """A relay before every prefill worker of an application, by its record in etcd.

    Args:
        world: in which the application's processes run.
        endpoints: of the application's etcd.
        cluster: as in its configuration.
    """

    def __init__(self, world: World, endpoints: Sequence[str], cluster: str) -> None:
        super().__init__()
        self._world = world
        self._prefix = workers_prefix(cluster)
        self._connector = EtcdConnector(
            EtcdSettings(endpoints=tuple(endpoints), cluster=cluster), 1.0
        )
        self._stop = threading.Event()
        self._looker = threading.Thread(target=self._look, name="relay-records", daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._looker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._looker.join()
        super().__exit__(kind, error, trace)

    def put_before(self, address: str, other: str = "") -> None:
        """Send those who connect to ``address`` from now on to ``other``, else to the relay."""
        target, instead = parse_address(address), parse_address(other or self.instead_of(address))
        self._world.connect_by(f"{target.host}:{target.port}", f"{instead.host}:{instead.port}")

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            try:
                client = self._connector.client()
                for item in client.list_prefix(self._prefix).items:
                    self._redirect(item)
                self._connector.succeeded()
            except EtcdUnavailable:
                self._connector.failed()
        self._connector.close()

    def _redirect(self, item: KeyValue) -> None:
        document = json.loads(item.value or b"{}")
        (address,) = document.get("addresses") or [""]
        if document.get("role") == "kv_producer" and address not in self._relays:
            self.put_before(address)
