"""Another build of ours to measure beside the present one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.transfer.contestants import ROOT


@contextmanager
def build_of(revision: str, folder: Path) -> Iterator[Path]:
    """A folder to import from: ``transfer`` as of ``revision``, the benchmark as it is now.

    Args:
        folder: an empty one, for a work tree of git's while the block lasts.

    Raises:
        SystemExit: git knows no such revision, or it cannot be checked out.
    """
    tree, packages = folder / "tree", folder / "packages"
    _git("worktree", "add", "--detach", str(tree), revision)
    try:
        packages.mkdir()
        (packages / "transfer").symlink_to(tree / "transfer")
        (packages / "bench").symlink_to(ROOT / "bench")
        yield packages
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {ran.stderr.strip()}")
