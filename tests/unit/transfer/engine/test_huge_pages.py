"""Huge pages are asked for, and never at the cost of what is in memory."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from transfer.engine.huge_pages import prefer_huge_pages

MIB = 1 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _huge_kib(address: int) -> int:
    """``AnonHugePages`` of the mapping that starts at or before ``address``."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1])
    return found


def test_memory_that_is_there_moves_into_huge_pages() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this kernel has transparent huge pages switched off")
    memory = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    pattern = bytes(range(256)) * (32 * MIB // 256)
    memory[:] = pattern
    address = _address(memory)
    middle = address + 16 * MIB
    assert _huge_kib(middle) == 0
    if not prefer_huge_pages(address, 32 * MIB):
        pytest.skip("this kernel does not know MADV_COLLAPSE, or has no huge pages to spare")
    assert _huge_kib(middle) >= 16 * 1024
    assert memory[:] == pattern


@pytest.mark.parametrize(("address", "length"), [(4096, 4096), (MIB, 2 * MIB), (1 << 46, 8 * MIB)])
def test_memory_that_cannot_have_them_is_no_error(address: int, length: int) -> None:
    assert prefer_huge_pages(address, length) is False
