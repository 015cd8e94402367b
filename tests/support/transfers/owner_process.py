"""An owner of hand-offs in a process of its own.

``python -m tests.support.transfers.owner_process``.

Prints one line of JSON (:class:`OwnerReport`), then serves until its standard input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tests.support.processes.reporting_process import report, reporting_process
from tests.support.transfers.engines import LAYOUT_HASH, Buffer, Directory, make_engine
from transfer.engine.handoff import Offer
from transfer.settings import TransferSettings
from transfer.types import Credentials, PeerId, WorkerRecord


@dataclass(frozen=True)
class OwnerReport:
    """What readers must know; every hand-off grants the whole buffer."""

    incarnation: str
    address: str
    base: int
    num_blocks: int
    block_bytes: int
    handoff_ids: list[str]

    @property
    def record(self) -> WorkerRecord:
        return WorkerRecord(
            PeerId("owner", 0), self.incarnation, "test", 1, (self.address,), LAYOUT_HASH, 0.0
        )

    def credentials(self, number: int) -> Credentials:
        return Credentials(self.handoff_ids[number], self.incarnation, number, "secret", "r")


@contextmanager
def owner_process(
    incarnation: str,
    num_blocks: int,
    block_bytes: int,
    offers: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[subprocess.Popen[str], OwnerReport]]:
    """A running owner, with other transfer settings than the defaults; killed at the end."""
    arguments = [incarnation, str(num_blocks), str(block_bytes), str(offers)]
    arguments.append(json.dumps({"slice_bytes": 256 << 10, **(settings or {})}))
    with reporting_process("tests.support.transfers.owner_process", *arguments) as (process, said):
        yield process, OwnerReport(**said)


def main() -> None:
    incarnation, num_blocks, block_bytes, offers, settings = sys.argv[1:]
    buffer = Buffer(int(num_blocks), int(block_bytes))
    engine = make_engine(
        Directory(),
        "owner",
        incarnation=incarnation,
        settings=TransferSettings(**json.loads(settings)),
    )
    engine.register(buffer.address, buffer.bytes.nbytes)
    with engine:
        handoff_ids = [f"{number:032x}" for number in range(int(offers))]
        for number, handoff_id in enumerate(handoff_ids):
            grant = buffer.spans(range(buffer.num_blocks))
            engine.offer(Offer(handoff_id, number, "secret", grant, 1, 60.0))
        report(
            asdict(
                OwnerReport(
                    incarnation,
                    engine.addresses[0],
                    buffer.address,
                    buffer.num_blocks,
                    buffer.block_bytes,
                    handoff_ids,
                )
            )
        )


if __name__ == "__main__":
    main()
