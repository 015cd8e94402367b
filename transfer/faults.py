"""Named points at which a test can hold a thread, to catch a hand-off in a known phase.

Off unless the environment variable ``BATON_FAULTS`` names a folder when the process starts; then
:func:`reach` and :func:`reach_async` return at once. Nothing else of Baton knows whether it is on.

The folder is all there is to it. A file with the name of a point arms it once: the first thread of
any process that reaches the point renames the file to ``<point>@<pid>``, whose content says what it
is about, and stays there until that file is deleted. If the file has content, only a thread that is
about that is held. Whoever armed it meanwhile knows which process is where, and may kill it, stop
it, cut its connections, or let it go on. The points are listed in docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

VARIABLE = "BATON_FAULTS"

LONGEST_HOLD_S = 300.0
"""A test that died must not leave processes held for ever."""

_POLL_S = 0.005

_folder = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def reach(point: str, about: str = "") -> None:
    """Stay here while ``point`` is armed. For threads that may block.

    Args:
        about: whom the thread is dealing with: an engine, a replica or a user.
    """
    if _folder is not None and (held := _claimed(_folder, point, about)) is not None:
        _stay(held)


async def reach_async(point: str, about: str = "") -> None:
    """As :func:`reach`, for coroutines: others of the event loop go on."""
    if _folder is not None and (held := _claimed(_folder, point, about)) is not None:
        await asyncio.to_thread(_stay, held)


def _claimed(folder: Path, point: str, about: str) -> Path | None:
    """The file that holds this thread, if the point was armed and nobody else took it."""
    mine = folder / f".{os.getpid()}-{threading.get_ident()}"
    try:
        wanted = (folder / point).read_text()
        if wanted and wanted != about:
            return None
        (folder / point).rename(mine)
    except FileNotFoundError:
        return None
    mine.write_text(about)
    return mine.rename(folder / f"{point}@{os.getpid()}")


def _stay(held: Path) -> None:
    deadline = time.monotonic() + LONGEST_HOLD_S
    while held.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
