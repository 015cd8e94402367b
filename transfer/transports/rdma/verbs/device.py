"""One device, and memory that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.transports.rdma.verbs.binding import Binding, load
from transfer.transports.rdma.verbs.completion_queue import CompletionQueue
from transfer.transports.rdma.verbs.port import Gid, Port
from transfer.transports.rdma.verbs.queue_pair import QueuePair
from transfer.types import DmaBuf

_SYSFS = Path("/sys/class/infiniband")


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


def device_names() -> list[str]:
    """RDMA devices of this machine, without asking pyverbs, which may not be there."""
    try:
        return sorted(entry.name for entry in _SYSFS.iterdir())
    except OSError:
        return []


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
