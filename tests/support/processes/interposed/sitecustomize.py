"""Stands between a process under test and the world: its wall clock, and where it connects to.

Python runs this at the start of every process that has this folder in ``PYTHONPATH``. The variable
``BATON_TEST_WORLD`` names the folder that :class:`tests.support.processes.world.World` writes.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

_folder = os.environ.get("BATON_TEST_WORLD", "")


def _shift_wall_clock(path: Path) -> None:
    """Adds to ``time.time`` the seconds in ``path``, a double, whatever they are then."""
    real = time.time
    with path.open("rb") as file:
        shift = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)

    def shifted() -> float:
        return real() + float(struct.unpack_from("d", shift)[0])

    time.time = shifted


def _connect_by_relays(folder: Path) -> None:
    """Connects to what the file ``host:port`` in ``folder`` names, where there is one."""
    module: Any = socket
    real = module.create_connection

    def connect(address: tuple[str, int], *args: Any, **more: Any) -> Any:
        host, port = address[:2]
        try:
            relay = (folder / f"{host}:{port}").read_text()
        except OSError:
            return real(address, *args, **more)
        host, _, port_text = relay.rpartition(":")
        return real((host, int(port_text)), *args, **more)

    module.create_connection = connect


if _folder:
    _shift_wall_clock(Path(_folder) / "clock")
    _connect_by_relays(Path(_folder) / "relays")
