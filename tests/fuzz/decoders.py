"""Everything of Baton that reads bytes of other processes, with examples of what it should read.

One list for the quick search in tests/unit (test_wire_fuzz.py) and the long one of `make fuzz`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from transfer.addressing import parse_address
from transfer.connector.kv.layout import KVLayout
from transfer.discovery.record import decode_record, encode_record
from transfer.errors import Phase
from transfer.ticket import Ticket
from transfer.transports.rdma import handshake
from transfer.transports.rdma.keys import KeyMap
from transfer.transports.shm.address import Host, ShmAddress
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import NONCE_BYTES, PROOF_BYTES
from transfer.types import Claim, PeerId, PeerInfo, ReaderProcess, WorkerRecord

PEER = PeerId("an-engine", 1)
CLAIM = Claim("a" * 32, "b" * 32, 7, "reader/0#request")
PROOF = bytes(range(PROOF_BYTES))
NONCE = bytes(range(NONCE_BYTES))
RENEWAL = wire.Renewal(CLAIM, PROOF)
SPANS = np.array([[4096, 512], [8192, 512]], dtype=np.uint64)
SHM = str(ShmAddress(Host("5a4f-7", 4026531836), 123, 0x7F00_0000_1000, bytes(range(16))))
TICKET = {
    "version": 2,
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "an-engine",
    "remote_request_id": "a-request",
    "remote_block_ids": [3, 4, 9],
    "tp_size": 1,
    "handoff_id": "a" * 32,
    "incarnation": "b" * 32,
    "fence": 7,
    "num_tokens": 70,
    "block_size": 32,
    "kv_axes": "BHNC",
    "layout_hash": "d" * 64,
    "prompt_hash": "e" * 64,
    "secret": "c" * 32,
    "readers": 1,
    "expires_at": 1.7e9,
}
RECORD = WorkerRecord(PEER, "b" * 32, "kv_producer", 2, ("tcp://127.0.0.1:1", SHM), "d" * 64, 1.0)
LAYOUT = KVLayout(
    bases=(1 << 20, 1 << 21),
    axes="BHNC",
    kernel_stride=8192,
    head_stride=4096,
    token_stride=128,
    kernel_tokens=32,
    kernels_per_block=1,
    num_blocks=64,
    packing="cpu-vec",
    strips=((16, 4), (1, 64)),
    granule=1,
    total_heads=2,
    rank=0,
    tp_size=1,
    digest_base=1 << 22,
    digest_tokens=16,
)
END = handshake.End(1, True, 17, 99, 0, 5, 16, bytes(range(16)))
KEYS = KeyMap(
    np.array([10, 20], dtype=np.uint64),
    np.array([15, 25], dtype=np.uint64),
    np.array([10, 0], dtype=np.uint64),
    np.array([[1], [2]], dtype=np.uint32),
)


@dataclass(frozen=True)
class Decoder:
    """One reader of foreign bytes.

    Attributes:
        decode: gives a value, or raises ``ProtocolError``; anything else is a bug.
        examples: what it accepts.
    """

    decode: Callable[[bytes], object]
    examples: tuple[bytes, ...]


def _ticket(data: bytes) -> object:
    """As a program in between would hand it over: parsed already."""
    try:
        params = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return Ticket.from_params(params)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


DECODERS = {
    "tcp header": Decoder(
        wire.decode_header,
        tuple(wire.encode_header(kind, 9, 0) for kind in wire.MessageType),
    ),
    "tcp proof": Decoder(wire.split_proof, (PROOF + b"rest", PROOF)),
    "tcp hello": Decoder(
        wire.decode_hello, (wire.encode_hello(ReaderProcess(PEER, "b" * 32), NONCE, CLAIM),)
    ),
    "tcp claim": Decoder(wire.claim_of, (wire.encode_abort(CLAIM, "why"),)),
    "tcp welcome": Decoder(
        wire.decode_welcome,
        (wire.encode_welcome(PeerInfo(PEER, "b" * 32, "d" * 64, LAYOUT.encode(), (SHM,)), NONCE),),
    ),
    "tcp read": Decoder(wire.decode_read, (wire.encode_read(CLAIM, SPANS),)),
    "tcp begin": Decoder(wire.decode_begin, (wire.encode_begin(CLAIM, "id", "rdma", SPANS),)),
    "tcp attach": Decoder(wire.decode_attach, (wire.encode_attach("rdma", b"own"),)),
    "tcp release": Decoder(
        wire.decode_release, (wire.encode_release(CLAIM, used=True, read_id="id"),)
    ),
    "tcp abort": Decoder(wire.decode_abort, (wire.encode_abort(CLAIM, "why"),)),
    "tcp renew": Decoder(wire.decode_renew, (wire.encode_renew([RENEWAL, RENEWAL]),)),
    "tcp renewed": Decoder(lambda data: wire.decode_renewed(data, 3), (b"\0\1\1",)),
    "tcp error": Decoder(lambda data: wire.decode_error(data, Phase.READ, "peer"), (b"\1\3\0why",)),
    "kv layout": Decoder(KVLayout.decode, (LAYOUT.encode(),)),
    "ticket": Decoder(
        _ticket,
        (json.dumps(TICKET).encode(), json.dumps({**TICKET, "readers": 3}).encode()),
    ),
    "discovery record": Decoder(decode_record, (encode_record(RECORD),)),
    "tcp address": Decoder(
        lambda data: parse_address(_text(data)), (b"tcp://127.0.0.1:80", b"tcp://[::1]:80")
    ),
    "shm address": Decoder(lambda data: ShmAddress.parse(_text(data)), (SHM.encode(),)),
    "rdma request": Decoder(
        handshake.decode_request, (handshake.encode_request([END, END], [3, 4]),)
    ),
    "rdma answer": Decoder(
        lambda data: handshake.decode_answer(data, 2), (handshake.encode_answer([END, END]),)
    ),
    "rdma keys": Decoder(KeyMap.decode, (KEYS.encode(),)),
}
