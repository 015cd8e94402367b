"""A buffer between scattered memory and something that wants its bytes side by side."""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np

from transfer.spans import total_bytes
from transfer.transports import process_memory
from transfer.types import SpanArray


class BounceBuffer:
    """``size_bytes`` of memory. Used by one thread at a time.

    The kernel copies all rows in one call and says so when memory is not there. Where it is
    forbidden to (seccomp), rows are copied one by one.
    """

    def __init__(self, size_bytes: int) -> None:
        memory = np.empty(size_bytes, dtype=np.uint8)
        self._address = int(memory.ctypes.data)
        self.view = memory.data

    def gather(self, spans: SpanArray) -> memoryview:
        """Fill it from ``spans``: at most ``IOV_MAX`` rows, which must fit.

        Returns:
            What was filled.

        Raises:
            OSError: memory is not there.
        """
        whole = self._span(spans)
        if not _copied_by_kernel(whole, spans):
            at = self._address
            for address, length in spans.tolist():
                ctypes.memmove(at, address, length)
                at += length
        return self.view[: int(whole[0, 1])]

    def scatter(self, spans: SpanArray) -> None:
        """Write its first bytes to ``spans``, as many as they hold; as :meth:`gather`."""
        if not _copied_by_kernel(spans, self._span(spans)):
            at = self._address
            for address, length in spans.tolist():
                ctypes.memmove(address, at, length)
                at += length

    def _span(self, spans: SpanArray) -> SpanArray:
        return np.array([[self._address, total_bytes(spans)]], dtype=np.uint64)


def _copied_by_kernel(to: SpanArray, source: SpanArray) -> bool:
    try:
        count = process_memory.read_process_memory(os.getpid(), to, source)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return False
        raise
    if count != total_bytes(to):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return True
