"""Arms the fault points of :mod:`transfer.faults` and says who is held at them."""

from __future__ import annotations

import time
from pathlib import Path


class Armed:
    """One point that will hold the next thread that reaches it, or does.

    Attributes:
        pid: the process that is held; known, like ``about``, once :meth:`wait` returned.
        about: the engine that the held thread is dealing with.
    """

    def __init__(self, folder: Path, point: str, about: str = "") -> None:
        self._folder = folder
        self._point = point
        self.pid = 0
        self.about = ""
        written = folder / f".{point}"
        written.write_text(about)
        written.rename(folder / point)

    def wait(self, timeout_s: float = 30.0) -> None:
        """Until a process is held.

        Raises:
            TimeoutError: nobody came.
        """
        deadline = time.monotonic() + timeout_s
        while (held := self._held()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody reached {self._point} in {timeout_s} s")
            time.sleep(0.005)
        self.about = held.read_text()
        self.pid = int(held.name.rpartition("@")[2])

    def release(self) -> None:
        """Let it go on; or, if nobody came, hold nobody. Idempotent."""
        (self._folder / self._point).unlink(missing_ok=True)
        if (held := self._held()) is not None:
            held.unlink(missing_ok=True)

    def _held(self) -> Path | None:
        return next(iter(self._folder.glob(f"{self._point}@*")), None)


class FaultPoints:
    """The folder that processes under test get as ``BATON_FAULTS``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def arm(self, point: str, about: str = "") -> Armed:
        """Hold the next thread that reaches ``point``, whatever process it is of.

        Args:
            about: only one that deals with this engine or user.
        """
        return Armed(self.folder, point, about)

    def clear(self) -> None:
        """Hold nobody, and let go of everybody."""
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
