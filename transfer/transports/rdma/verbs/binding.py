"""pyverbs, in the version that this machine has.

Two builds are known: Debian's python3-pyverbs 44, outside of any virtual environment, and PyPI's
pyverbs from 59 on. What they name differently is settled in this package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from transfer.errors import Phase, TransportUnavailable
from transfer.transports.rdma.verbs.error import VerbsError

_SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"


class Binding:
    """The modules of pyverbs that are used."""

    def __init__(self) -> None:
        self.device = importlib.import_module("pyverbs.device")
        self.pd = importlib.import_module("pyverbs.pd")
        self.mr = importlib.import_module("pyverbs.mr")
        self.cq = importlib.import_module("pyverbs.cq")
        self.qp = importlib.import_module("pyverbs.qp")
        self.wr = importlib.import_module("pyverbs.wr")
        self.addr = importlib.import_module("pyverbs.addr")
        self.error = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
        self.enums = _enums()

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Turn pyverbs' errors into :class:`VerbsError`."""
        try:
            yield
        except self.error as error:
            code = getattr(error, "error_code", -1)
            raise VerbsError(code if code > 0 else 0, f"{what}: {error}") from error


@functools.cache
def load() -> Binding:
    """Import pyverbs.

    Raises:
        TransportUnavailable: it is not installed, or does not fit this Python or rdma-core.
    """
    try:
        with _root_logger_kept():
            _import_package()
            return Binding()
    except ImportError as error:
        raise TransportUnavailable(
            f"pyverbs cannot be imported ({error}): install the system's package "
            "python3-pyverbs, or baton-serve[rdma] where it can be built",
            phase=Phase.CONNECT,
        ) from error


def _import_package() -> ModuleType:
    try:
        return importlib.import_module("pyverbs")
    except ModuleNotFoundError:
        # Only this package of the system's: its directory on sys.path would let in all others.
        spec = importlib.machinery.PathFinder.find_spec("pyverbs", [_SYSTEM_PACKAGES])
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        try:
            spec.loader.exec_module(module)
        except ImportError:
            del sys.modules["pyverbs"]
            raise
        return module


def _enums() -> ModuleType:
    try:
        return importlib.import_module("pyverbs.libibverbs_enums")
    except ModuleNotFoundError:
        return importlib.import_module("pyverbs.enums")


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what pyverbs does to the whole process's logging when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
