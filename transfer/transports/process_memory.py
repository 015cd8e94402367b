"""Reading the memory of another process of this host: one system call, one copy.

``process_vm_readv`` takes rows of span arrays as its ``struct iovec`` arrays. ctypes lets go of the
interpreter's lock for the time of the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from transfer.types import SpanArray

IOV_MAX = 1024
"""Rows that one call takes on each side; Linux refuses more."""


def _libc_call() -> Callable[[int, int, int, int, int, int], int]:
    try:
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:  # a C library without it
        return _missing
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    function.restype = ctypes.c_ssize_t
    return function


def _missing(*_: int) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


_process_vm_readv = _libc_call()


def read_process_memory(pid: int, local: SpanArray, remote: SpanArray) -> int:
    """Copy the bytes of ``remote`` in process ``pid`` to ``local``, in order.

    Args:
        local: C-contiguous, at most :data:`IOV_MAX` rows, memory that may be written to.
        remote: as ``local``; rows may be cut otherwise.

    Returns:
        Bytes copied: fewer than asked for where a row of ``remote`` cannot be read.

    Raises:
        OSError: no byte was copied. ``EPERM`` when the kernel forbids it, ``ENOSYS`` when there is
            no such call, ``ESRCH`` when there is no such process, ``EFAULT`` when memory is not
            there.
    """
    count = _process_vm_readv(
        pid, local.ctypes.data, local.shape[0], remote.ctypes.data, remote.shape[0], 0
    )
    if count < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return count
