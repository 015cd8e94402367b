"""The examples of using the transfer library alone do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.servers.etcd_server import EtcdServer

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


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


def test_the_lines_of_the_documentation(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "transfer.md").read_text()
    for name, code in zip(
        ("owner.py", "reader.py"), re.findall(r"```python\n(.*?)```", text, re.DOTALL), strict=True
    ):
        (tmp_path / name).write_text(code)
    (said,) = re.findall(r"`python owner.py \| python reader.py` prints `(.*?)`", text)
    owner = subprocess.Popen(
        [sys.executable, "owner.py"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    with owner:
        try:
            reader = subprocess.run(
                [sys.executable, "reader.py"],
                cwd=tmp_path,
                env=ENVIRONMENT,
                stdin=owner.stdout,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (reader.stdout.strip(), reader.returncode) == (said, 0), reader.stderr
            assert owner.wait(30) == 0
        finally:
            owner.kill()
