"""What processes under test take for the wall clock, and by which relays they connect."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_INTERPOSED = Path(__file__).with_name("interposed")


class World:
    """The folder that ``interposed/sitecustomize.py`` reads in every process.

    Args:
        folder: made here.
    """

    def __init__(self, folder: Path) -> None:
        self._clock = folder / "clock"
        self._relays = folder / "relays"
        self._relays.mkdir(parents=True)
        self._clock.write_bytes(struct.pack("d", 0.0))
        self._folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """For the first process; its children have it from there."""
        path = [str(_INTERPOSED), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"BATON_TEST_WORLD": str(self._folder), "PYTHONPATH": os.pathsep.join(path)}

    def set_clock(self, seconds: float) -> None:
        """All wall clocks, by so many seconds from the real one."""
        with self._clock.open("r+b") as file:
            file.write(struct.pack("d", seconds))

    def connect_by(self, target: str, relay: str) -> None:
        """Who connects to ``target`` from now on gets ``relay``; both are ``host:port``."""
        written = self._relays / ".new"
        written.write_text(relay)
        written.rename(self._relays / target)
