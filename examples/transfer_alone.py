"""Baton's transfer library alone: one process offers blocks of a numpy array, another reads them.

    python examples/transfer_alone.py                          # peers found by a static list
    python examples/transfer_alone.py --etcd 127.0.0.1:2379    # peers found in etcd

The first process is the owner. It starts the second one, the reader, and hands it a ticket: here
through a pipe, in a service by whatever carries its requests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from transfer.discovery import make_discovery
from transfer.engine.engine import TransferEngine
from transfer.engine.handoff import Offer
from transfer.settings import TransferSettings
from transfer.spans import block_spans
from transfer.types import Credentials, PeerId, PeerInfo, ReadPlan

BLOCK_BYTES = 64 << 10
OWNER, READER = PeerId("owner", 0), PeerId("reader", 0)


@contextmanager
def engine(peer: PeerId, discovery: dict[str, Any], memory: np.ndarray) -> Iterator[TransferEngine]:
    """An engine that may read from and write to ``memory`` and tells readers where that lies."""
    with closing(make_discovery(discovery)) as found:
        found.ready(5.0)
        made = TransferEngine(
            peer=peer,
            incarnation=uuid.uuid4().hex,
            role="example",
            tp_size=1,
            layout_hash="example, version 1",
            layout=json.dumps({"base": memory.ctypes.data}).encode(),
            discovery=found,
            settings=TransferSettings(),
        )
        made.register(memory.ctypes.data, memory.nbytes)
        with made:
            yield made


def own(etcd: str) -> None:
    """Offer three blocks of an array; start a reader and wait until it is done."""
    memory = np.arange(16 * BLOCK_BYTES, dtype=np.uint32).view(np.uint8)
    discovery: dict[str, Any] = {"kind": "static", "peers": []}
    if etcd:
        discovery = {"kind": "etcd", "endpoints": [etcd]}
    with engine(OWNER, discovery, memory) as owner:
        block_ids, secret = [9, 2, 5], secrets.token_hex(16)
        grant = block_spans(memory.ctypes.data, BLOCK_BYTES, BLOCK_BYTES, block_ids)
        offer = Offer(uuid.uuid4().hex, 1, secret, grant, readers=1, ttl_s=30.0)
        owner.offer(offer)
        ticket = {
            "credentials": [offer.handoff_id, owner.incarnation, offer.fence, secret, "reader"],
            "block_ids": block_ids,
            "digest": digest(memory.reshape(-1, BLOCK_BYTES)[block_ids]),
        }
        if not etcd:
            peer = {"engine_id": "owner", "role": "example", "addresses": owner.addresses[:1]}
            discovery = {"kind": "static", "peers": [peer]}
        subprocess.run(
            [sys.executable, __file__, "--read", json.dumps(discovery)],
            input=json.dumps(ticket),
            text=True,
            check=True,
        )
        while not (ended := owner.take_ended()):
            time.sleep(0.01)
        print(f"owner: {ended[0].state.value}, {len(block_ids)} blocks are free again")


def read(discovery: dict[str, Any], ticket: dict[str, Any]) -> None:
    """Read what a ticket offers into the first blocks of an array."""
    memory = np.zeros(4 * BLOCK_BYTES, dtype=np.uint8)
    block_ids = ticket["block_ids"]

    def plan(owner: PeerInfo) -> ReadPlan:
        base = json.loads(owner.layout)["base"]
        return ReadPlan(
            local=block_spans(memory.ctypes.data, BLOCK_BYTES, BLOCK_BYTES, range(len(block_ids))),
            remote=block_spans(base, BLOCK_BYTES, BLOCK_BYTES, block_ids),
        )

    with engine(READER, discovery, memory) as reader:
        handle = reader.submit_read(OWNER, Credentials(*ticket["credentials"]), plan, 10.0)
        handle.wait()
        if handle.error is not None:
            raise handle.error
        right = digest(memory[: handle.bytes_moved]) == ticket["digest"]
        print(f"reader: {handle.state.value}, {handle.bytes_moved} bytes, right: {right}")


def digest(blocks: np.ndarray) -> str:
    """Of all bytes in their order."""
    return hashlib.sha256(blocks.tobytes()).hexdigest()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Move blocks of an array between two processes.")
    parser.add_argument("--etcd", default="", help="host:port; without it, a static list of peers")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(json.loads(arguments.read), json.load(sys.stdin))
    else:
        own(arguments.etcd)


if __name__ == "__main__":
    main()
