"""One end of a reliable connection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from transfer.transports.rdma.verbs.binding import Binding
from transfer.transports.rdma.verbs.completion_queue import CompletionQueue

# 4.096 µs times two to the power of this: 0.54 s for one packet, then it is sent again.
_ACK_TIMEOUT = 17
# Not 7, which soft-RoCE takes for ever and ever: 3.2 s until a peer counts as gone.
_RETRIES = 5

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
