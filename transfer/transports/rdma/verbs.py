"""pyverbs, in the version that this machine has. No other module imports it or knows its names.

Two builds are known: Debian's python3-pyverbs 44, outside of any virtual environment, and PyPI's
pyverbs from 59 on. What they name differently is settled here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from transfer.errors import Phase, TransportUnavailable
from transfer.types import DmaBuf

_SYSFS = Path("/sys/class/infiniband")
_SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
_EVENT_FILE = "anon_inode:[infinibandevent]"
_CHANNEL_TRIES = 16

# Of ``ibv_gid_entry``; neither build has names for them.
GID_IB, GID_ROCE_V1, GID_ROCE_V2 = 0, 1, 2

_making_channel = threading.Lock()


class VerbsError(OSError):
    """A verbs call failed; ``errno`` says how."""


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's table of addresses."""

    index: int
    kind: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Port:
    """What a device says of one of its ports.

    Attributes:
        mtu: as verbs count it, 1 for 256 bytes to 5 for 4096.
        max_message_bytes: longest single read.
    """

    number: int
    active: bool
    ethernet: bool
    lid: int
    mtu: int
    max_message_bytes: int
    gids: tuple[Gid, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device can hold.

    Attributes:
        reads_served: reads that one queue pair can answer at once.
        reads_asked: reads that one queue pair can have asked for at once.
    """

    queue_depth: int
    completions: int
    reads_served: int
    reads_asked: int


Read: TypeAlias = tuple[int, int, int, int, int]
"""One read: local address, length, local key, remote address, remote key."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a queue pair's packets go.

    Attributes:
        gid: of the other end; None for a path within an InfiniBand subnet.
        gid_index: of this end.
        reads: that this end may ask for at once, and that it answers at once.
    """

    port: int
    mtu: int
    peer_number: int
    peer_psn: int
    own_psn: int
    lid: int
    gid: bytes | None
    gid_index: int
    reads: int


class Binding:
    """The modules of pyverbs that are used."""

    def __init__(self) -> None:
        self.device = importlib.import_module("pyverbs.device")
        self.pd = importlib.import_module("pyverbs.pd")
        self.mr = importlib.import_module("pyverbs.mr")
        self.cq = importlib.import_module("pyverbs.cq")
        self.qp = importlib.import_module("pyverbs.qp")
        self.wr = importlib.import_module("pyverbs.wr")
        self.addr = importlib.import_module("pyverbs.addr")
        self.error = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
        self.enums = _enums()

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Turn pyverbs' errors into :class:`VerbsError`."""
        try:
            yield
        except self.error as error:
            code = getattr(error, "error_code", -1)
            raise VerbsError(code if code > 0 else 0, f"{what}: {error}") from error


@contextmanager
def unavailable(phase: Phase, peer: str) -> Iterator[None]:
    """Turn what devices and the kernel refuse into :class:`TransportUnavailable`."""
    try:
        yield
    except OSError as error:
        raise TransportUnavailable(
            f"rdma does not work: {error}", phase=phase, peer=peer
        ) from error


def device_names() -> list[str]:
    """RDMA devices of this machine, without asking pyverbs, which may not be there."""
    try:
        return sorted(entry.name for entry in _SYSFS.iterdir())
    except OSError:
        return []


@functools.cache
def load() -> Binding:
    """Import pyverbs.

    Raises:
        TransportUnavailable: it is not installed, or does not fit this Python or rdma-core.
    """
    try:
        with _root_logger_kept():
            _import_package()
            return Binding()
    except ImportError as error:
        raise TransportUnavailable(
            f"pyverbs cannot be imported ({error}): install the system's package "
            "python3-pyverbs, or baton-serve[rdma] where it can be built",
            phase=Phase.CONNECT,
        ) from error


def _import_package() -> ModuleType:
    try:
        return importlib.import_module("pyverbs")
    except ModuleNotFoundError:
        # Only this package of the system's: its directory on sys.path would let in all others.
        spec = importlib.machinery.PathFinder.find_spec("pyverbs", [_SYSTEM_PACKAGES])
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        try:
            spec.loader.exec_module(module)
        except ImportError:
            del sys.modules["pyverbs"]
            raise
        return module


def _enums() -> ModuleType:
    try:
        return importlib.import_module("pyverbs.libibverbs_enums")
    except ModuleNotFoundError:
        return importlib.import_module("pyverbs.enums")


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what pyverbs does to the whole process's logging when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


class Registration:
    """Memory that one device may touch.

    Attributes:
        base: what the device calls its first byte.
    """

    def __init__(self, binding: Binding, region: Any, base: int) -> None:
        self._binding = binding
        self._region = region
        self.base = base
        self.local_key: int = region.lkey
        self.remote_key: int = region.rkey

    def close(self) -> None:
        """Take the device's access away; reads by peers fail from then on. Idempotent."""
        with self._binding.translated("deregister memory"):
            self._region.close()


class OpenDevice:
    """One device, open. Closing it closes what was made with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.binding = load()
        with self.binding.translated(f"open {name}"):
            self._context = self.binding.device.Context(name=name)
            self._domain = self.binding.pd.PD(self._context)
            found = self._context.query_device()
        self.limits = Limits(
            queue_depth=int(found.max_qp_wr),
            completions=int(found.max_cqe),
            reads_served=int(found.max_qp_rd_atom),
            reads_asked=int(found.max_qp_init_rd_atom),
        )
        self._num_ports = int(found.phys_port_cnt)

    def __repr__(self) -> str:
        return f"<OpenDevice {self.name}>"

    def ports(self) -> list[Port]:
        """All ports with their addresses."""
        enums = self.binding.enums
        ports = []
        with self.binding.translated(f"query {self.name}"):
            for number in range(1, self._num_ports + 1):
                found = self._context.query_port(number)
                ports.append(
                    Port(
                        number=number,
                        active=found.state == enums.IBV_PORT_ACTIVE,
                        ethernet=found.link_layer == enums.IBV_LINK_LAYER_ETHERNET,
                        lid=int(found.lid),
                        mtu=int(found.active_mtu),
                        max_message_bytes=int(found.max_msg_sz),
                        gids=self._gids(number, int(found.gid_tbl_len)),
                    )
                )
        return ports

    def register(self, address: int, length: int, dmabuf: DmaBuf | None = None) -> Registration:
        """Let the device write to this memory, and peers that know its key read it.

        Args:
            dmabuf: of memory that is another device's.

        Raises:
            VerbsError: for instance ENOMEM when the limit of locked memory is too low, or
                EOPNOTSUPP when the driver takes no dma-buf.
        """
        enums, mr = self.binding.enums, self.binding.mr
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_READ
        with self.binding.translated(f"register {length} bytes with {self.name}"):
            if dmabuf is None:
                region = mr.MR(self._domain, length, access, address=address)
                return Registration(self.binding, region, address)
            # pyverbs has the device count from the beginning of the dma-buf.
            fd, offset = dmabuf.fd, dmabuf.offset
            region = mr.DmaBufMR(self._domain, length, access, dmabuf=fd, offset=offset)
            return Registration(self.binding, region, offset)

    def completion_queue(self, entries: int, *, events: bool) -> CompletionQueue:
        """A queue for the ends of what queue pairs were asked to do."""
        with self.binding.translated("make a completion queue"):
            return CompletionQueue(self.binding, self._context, entries, events=events)

    def queue_pair(self, completions: CompletionQueue, depth: int) -> QueuePair:
        """A queue pair that is not connected yet."""
        with self.binding.translated("make a queue pair"):
            return QueuePair(self.binding, self._context, self._domain, completions, depth)

    def close(self) -> None:
        """Idempotent."""
        with self.binding.translated(f"close {self.name}"):
            self._context.close()

    def _gids(self, port: int, table_length: int) -> tuple[Gid, ...]:
        entries = self._context.query_gid_table(max(1, table_length * self._num_ports))
        return tuple(
            Gid(
                int(entry.gid_index),
                int(entry.gid_type),
                bytes.fromhex(entry.gid_str().replace(":", "")),
            )
            for entry in entries
            if entry.port_num == port
        )


class CompletionQueue:
    """Ends of work requests, and a descriptor that becomes readable when there are new ones.

    For one thread.
    """

    def __init__(self, binding: Binding, context: Any, entries: int, *, events: bool) -> None:
        self._binding = binding
        self._channel: Any = None
        self.fd = -1
        if events:
            self._channel, self.fd = _open_channel(binding, lambda: binding.cq.CompChannel(context))
        self.raw = binding.cq.CQ(context, entries, None, self._channel, 0)
        if events:
            self.raw.req_notify()

    def poll(self, limit: int) -> list[tuple[int, int]]:
        """Up to ``limit`` ends as (request id, status); does not wait."""
        with self._binding.translated("poll"):
            _, found = self.raw.poll(limit)
        return [(end.wr_id, end.status) for end in found]

    def rearm(self) -> None:
        """After ``fd`` became readable: take the event and ask for the next. Poll afterwards."""
        with self._binding.translated("take an event"):
            self._channel.get_cq_event(self.raw)
            self.raw.ack_events(1)
            self.raw.req_notify()

    def close(self) -> None:
        """After its queue pairs. Idempotent."""
        with self._binding.translated("close a completion queue"):
            self.raw.close()
            if self._channel is not None:
                self._channel.close()


class QueuePair:
    """One end of a reliable connection. For one thread."""

    def __init__(
        self, binding: Binding, context: Any, domain: Any, completions: CompletionQueue, depth: int
    ) -> None:
        self._binding = binding
        self._enums = binding.enums
        qp, enums = binding.qp, binding.enums
        cap = qp.QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        kind = enums.IBV_QPT_RC
        try:
            extended = qp.QPInitAttrEx(
                qp_type=kind,
                scq=completions.raw,
                rcq=completions.raw,
                cap=cap,
                pd=domain,
                comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
                send_ops_flags=enums.IBV_QP_EX_WITH_RDMA_READ,
            )
            self._pair = qp.QPEx(context, extended)
            self._post = self._post_extended
            self._element = binding.wr.SGE(0, 0, 0)
        except binding.error:  # a driver without the extended calls
            plain = qp.QPInitAttr(
                qp_type=kind,
                scq=completions.raw,
                rcq=completions.raw,
                cap=cap,
                sq_sig_all=0,
            )
            self._pair = qp.QP(domain, plain)
            self._post = self._post_plain
            self._element = None
        self.number: int = self._pair.qp_num

    def connect(self, route: Route) -> None:
        """Bring it up; from then on the peer may read.

        Raises:
            VerbsError: the route leads nowhere, or a number does not suit the device.
        """
        enums, addr = self._enums, self._binding.addr
        with self._binding.translated("connect a queue pair"):
            way = None
            if route.gid is not None:
                text = route.gid.hex()
                words = ":".join(text[at : at + 4] for at in range(0, 32, 4))
                way = addr.GlobalRoute(
                    dgid=addr.GID(words), sgid_index=route.gid_index, hop_limit=64
                )
            attributes = self._binding.qp.QPAttr(port_num=route.port)
            attributes.pkey_index = 0
            attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_READ
            attributes.path_mtu = route.mtu
            attributes.dest_qp_num = route.peer_number
            attributes.rq_psn = route.peer_psn
            attributes.sq_psn = route.own_psn
            attributes.max_dest_rd_atomic = route.reads
            attributes.max_rd_atomic = route.reads
            attributes.min_rnr_timer = 12
            attributes.timeout = _ACK_TIMEOUT
            attributes.retry_cnt = _RETRIES
            attributes.rnr_retry = _RETRIES
            attributes.ah_attr = addr.AHAttr(
                dlid=route.lid,
                port_num=route.port,
                is_global=0 if way is None else 1,
                gr=way,
            )
            self._pair.to_rts(attributes)

    def post_reads(self, request_id: int, count: int, reads: Iterable[Read]) -> None:
        """Ask for ``count`` reads; only the last one announces its end, the others if they fail."""
        with self._binding.translated("post reads"):
            self._post(request_id, count, reads)

    def close(self) -> None:
        """Give it up; its device touches no memory for it any more. Idempotent."""
        with self._binding.translated("close a queue pair"):
            self._pair.close()
            if self._element is not None:
                self._element.close()
                self._element = None

    def _post_extended(self, request_id: int, count: int, reads: Iterable[Read]) -> None:
        pair, element = self._pair, self._element
        filled = False
        pair.wr_start()
        try:
            pair.wr_id = request_id
            pair.wr_flags = 0
            for address, length, key, far_address, far_key in reads:
                count -= 1
                if not count:
                    pair.wr_flags = self._enums.IBV_SEND_SIGNALED
                pair.wr_rdma_read(far_key, far_address)
                element.addr = address
                element.length = length
                element.lkey = key
                pair.wr_set_sge(element)
            filled = True
        finally:
            if not filled:
                pair.wr_abort()  # holds a lock of the provider's until then
        pair.wr_complete()

    def _post_plain(self, request_id: int, count: int, reads: Iterable[Read]) -> None:
        wr, enums = self._binding.wr, self._enums
        elements: list[Any] = []
        requests: list[Any] = []
        following: Any = None
        try:
            for address, length, key, far_address, far_key in reversed(list(reads)):
                element = wr.SGE(address, length, key)
                elements.append(element)
                request = wr.SendWR(
                    wr_id=request_id,
                    opcode=enums.IBV_WR_RDMA_READ,
                    num_sge=1,
                    sg=[element],
                    send_flags=0 if requests else enums.IBV_SEND_SIGNALED,
                    next_wr=following,
                )
                request.set_wr_rdma(far_key, far_address)
                requests.append(request)
                following = request
            self._pair.post_send(following)
        finally:
            # The 44 build never frees them by itself.
            for made in (*elements, *requests):
                made.close()


# 4.096 µs times two to the power of this: 0.54 s for one packet, then it is sent again.
_ACK_TIMEOUT = 17
# Not 7, which soft-RoCE takes for ever and ever: 3.2 s until a peer counts as gone.
_RETRIES = 5


def _open_channel(binding: Binding, make: Callable[[], Any]) -> tuple[Any, int]:
    """A completion channel and its descriptor, which the 44 build does not tell."""
    if hasattr(binding.cq.CompChannel, "fd"):
        channel = make()
        return channel, int(channel.fd)
    with _making_channel:
        for _ in range(_CHANNEL_TRIES):
            before = _event_files()
            channel = make()
            found = _event_files() - before
            if len(found) == 1:
                return channel, found.pop()
            # Another library of this process opened or closed one at the same moment.
            channel.close()
    raise VerbsError(0, "cannot tell which descriptor a completion channel has")


def _event_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _EVENT_FILE:
                found.add(int(name))
        except OSError:  # closed meanwhile
            continue
    return found
