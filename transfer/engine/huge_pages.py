"""Asks the kernel to back registered memory with huge pages.

Copying between processes has the kernel find and hold every page: with pages of 4 KiB that costs
as much as the copy itself. See ``madvise(2)``: MADV_HUGEPAGE (Linux 2.6.38) is about pages yet to
come, MADV_COLLAPSE (6.1) about those that are there.
"""

from __future__ import annotations

import ctypes

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_HUGE_PAGE_BYTES = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def prefer_huge_pages(address: int, length: int) -> bool:
    """Advises the whole huge pages inside ``length`` bytes at ``address``.

    The content stays as it is. Memory that cannot have huge pages (a file's, a device's), a kernel
    that has none to spare or does not know the advice: all that is no error, only slower.

    Returns:
        whether the memory that was there is in huge pages now.
    """
    first = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (address + length) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if end <= first:
        return False
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        where, size = ctypes.c_void_p(first), ctypes.c_size_t(end - first)
        if _libc.madvise(where, size, ctypes.c_int(advice)) != 0:
            return False
    return True
