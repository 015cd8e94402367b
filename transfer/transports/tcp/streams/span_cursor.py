"""Scattered memory that goes into a socket or comes out of one, without copies in user space.

``sendmsg`` and ``recvmsg`` of libc take rows of a span array as their ``struct iovec`` array. They
are ``writev`` and ``readv`` with flags: no signal for a broken pipe, and wait for everything, so
that a thread comes back for the interpreter's lock once per batch and not once per packet.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

import numpy as np

from transfer.spans import slice_plan
from transfer.types import ReadPlan, SpanArray

IOV_MAX = 1024
"""Rows that one call takes; Linux refuses more."""


class _MessageHeader(ctypes.Structure):
    """``struct msghdr`` of 64-bit Linux."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_Call = Callable[[int, "ctypes._Pointer[_MessageHeader]", int], int]


def _libc_call(name: str) -> _Call:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes = (ctypes.c_int, ctypes.POINTER(_MessageHeader), ctypes.c_int)
    function.restype = ctypes.c_ssize_t
    return function  # type: ignore[no-any-return]  # ctypes functions are untyped


_sendmsg = _libc_call("sendmsg")
_recvmsg = _libc_call("recvmsg")


class SpanCursor:
    """Where in some spans the next byte goes or comes from.

    Args:
        spans: rows of memory that stays valid while the cursor is used; copied, as a row that was
            moved in part is changed.
    """

    def __init__(self, spans: SpanArray) -> None:
        self._rows = np.array(spans, dtype=np.uint64, order="C")
        self._ends = np.cumsum(self._rows[:, 1])
        self._header = _MessageHeader()
        self._pointer = ctypes.pointer(self._header)
        self._base = self._rows.ctypes.data
        self.total_bytes = int(self._ends[-1]) if self._ends.size else 0
        self.done_bytes = 0
        self._aim()

    def send(self, fd: int, flags: int) -> int:
        """One system call; the bytes it moved.

        Raises:
            OSError: as the call failed; ``EINTR`` is handled.
        """
        return self._move(_sendmsg, fd, flags)

    def receive(self, fd: int, flags: int) -> int:
        """As :meth:`send`; 0 at end of stream."""
        return self._move(_recvmsg, fd, flags)

    def slices(self, max_bytes: int) -> Iterator[tuple[SpanArray, int]]:
        """All spans in slices of at most ``max_bytes`` bytes, with their bytes, each to be moved
        before the next one is asked for. Instead of :meth:`send` and :meth:`receive`."""
        whole = ReadPlan(local=self._rows, remote=self._rows)
        for slice_ in slice_plan(whole, max_bytes, IOV_MAX):
            size = int(slice_.local[:, 1].sum())
            yield slice_.local, size
            self.done_bytes += size

    def _move(self, call: _Call, fd: int, flags: int) -> int:
        while True:
            count = call(fd, self._pointer, flags)
            if count >= 0:
                break
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        self.done_bytes += count
        if 0 < self.done_bytes < self.total_bytes:
            self._aim()
        return count

    def _aim(self) -> None:
        row = int(np.searchsorted(self._ends, self.done_bytes, side="right"))
        if row < self._rows.shape[0]:
            left = int(self._ends[row]) - self.done_bytes
            address, length = self._rows[row].tolist()
            if left != length:
                self._rows[row] = (address + length - left, left)
        self._header.iov = self._base + row * 16
        self._header.iov_length = min(self._rows.shape[0] - row, IOV_MAX)
