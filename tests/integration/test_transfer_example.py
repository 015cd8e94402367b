"""The example of using the transfer library alone does what its first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.etcd_server import EtcdServer

ROOT = Path(__file__).resolve().parents[2]


def run_example(*arguments: str) -> list[str]:
    """The lines that the example prints."""
    done = subprocess.run(
        [sys.executable, "examples/transfer_alone.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "reads from owner/0 go over" in done.stderr
    return done.stdout.splitlines()


SAID = [
    f"reader: done, {3 * 65_536} bytes, right: True",
    "owner: released, 3 blocks are free again",
]


def test_with_a_static_list_of_peers() -> None:
    assert run_example() == SAID


def test_with_etcd() -> None:
    with EtcdServer() as etcd:
        assert run_example("--etcd", etcd.endpoint) == SAID
