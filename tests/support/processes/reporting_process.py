"""A module of the tests as a process that says what it did and then waits for its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def reporting_process(
    module: str, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs ``module`` until it has called :func:`report`; killed at the end of the block.

    Raises:
        RuntimeError: it ended without a report; what it printed to standard error is the test's.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise RuntimeError(f"{module} ended without a report")
            yield process, json.loads(said)
        finally:
            process.kill()


def report(found: dict[str, Any]) -> None:
    """In the process: tell the test; returns when that has ended or is through."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
