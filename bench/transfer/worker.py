"""One end of a system in a process of its own: ``... bench.transfer.worker owner|reader MODULE``.

Takes commands from standard input and answers on standard output, one JSON object a line each:
``{"do": name, ...}`` and ``{"ok": ...}`` or ``{"error": text}``. Ends when standard input does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter, contiguous, scatter
from bench.transfer.systems.base import OwnerEnd, ReaderEnd


class OwnerWorker:
    """Commands to an owner."""

    def __init__(self, end: OwnerEnd) -> None:
        self._end = end
        self._pool = Pool(0x1000)
        self._where: Scatter | None = None

    def open(self, pool_bytes: int, scratch: str) -> dict[str, Any]:
        self._pool = Pool(pool_bytes)
        facts = self._end.open(self._pool, scratch)
        return {"base": self._pool.address, **facts}

    def load(self, case: dict[str, Any]) -> None:
        """Fill the blocks of a case."""
        self._where = _where(Case(**case), self._pool, self._end.scattered)
        self._pool.fill(self._where.block_bytes, self._where.remote)

    def offer(self, reads: int) -> dict[str, Any]:
        """Let the loaded blocks be read so often."""
        if self._where is None:
            raise RuntimeError("no case is loaded")
        return self._end.offer(self._where, reads)

    def drop(self) -> None:
        self._pool.drop()

    def close(self) -> None:
        self._end.close()


class ReaderWorker:
    """Commands to a reader."""

    def __init__(self, end: ReaderEnd) -> None:
        self._end = end
        self._pool = Pool(0x1000)
        self._case = Case(0, 0)
        self._where: Scatter | None = None

    def open(self, pool_bytes: int, scratch: str, owner: dict[str, Any]) -> dict[str, Any]:
        self._pool = Pool(pool_bytes)
        self._end.open(self._pool, scratch, owner)
        return {}

    def load(self, case: dict[str, Any]) -> None:
        """Make the pages of a case's blocks present."""
        self._case = Case(**case)
        self._where = _where(self._case, self._pool, self._end.scattered)
        self._pool.clear(self._where.block_bytes, self._where.local)
        self._end.load(self._case, self._where)

    def ready(self, offer: dict[str, Any]) -> None:
        """Spoil what an earlier read brought; whatever is not timed."""
        where = self._loaded()
        self._pool.blur(where.block_bytes, where.local)
        self._end.ready(offer)

    def read(self) -> list[int]:
        """Nanoseconds of each read that counts."""
        read, clock = self._end.read, time.perf_counter_ns
        spent = []
        for _ in range(self._case.warm_up + self._case.reads):
            if self._case.anew:
                self._end.disconnect()
            start = clock()
            read()
            spent.append(clock() - start)
        return spent[self._case.warm_up :]

    def check(self, all_bytes: bool) -> None:
        if not self._pool.holds(self._loaded(), all_bytes=all_bytes):
            raise RuntimeError("wrong bytes after the read")

    def drop(self) -> None:
        self._pool.drop()
        self._end.drop()

    def close(self) -> None:
        self._end.close()

    def _loaded(self) -> Scatter:
        if self._where is None:
            raise RuntimeError("no case is loaded")
        return self._where


def _where(case: Case, pool: Pool, scattered: bool) -> Scatter:
    return scatter(case, pool.size_bytes) if scattered else contiguous(case)


def serve(worker: OwnerWorker | ReaderWorker, commands: TextIO, answers: TextIO) -> None:
    """Carry out commands until there are no more."""
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"ok": getattr(worker, name)(**command)}
        except Exception as error:  # noqa: BLE001 a foreign library raises what it likes
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    role, module_name = sys.argv[1:3]
    # Libraries write to standard output; that must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(module_name)
    worker = OwnerWorker(module.Owner()) if role == "owner" else ReaderWorker(module.Reader())
    serve(worker, sys.stdin, answers)
    # Some libraries hang or crash when they are torn down; all that counted is over.
    os._exit(0)


if __name__ == "__main__":
    main()
