"""How the CUDA driver is called, by a library with its names that writes down what it gets."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from transfer.cuda import CudaDriver, export
from transfer.errors import TransportUnavailable

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int cuInit(unsigned flags) { return flags == 0 && !getenv("CUDA_BROKEN") ? 0 : 999; }
int cuPointerGetAttribute(int *data, int attribute, unsigned long long pointer) {
    if (attribute != 9 || pointer != 0x7f0000000200ull) return 1;
    *data = 3;
    return 0;
}
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 43) return 101;
    *value = attribute == 118 ? 200 : attribute == 124;
    return 0;
}
#ifndef OLD
int cuMemGetHandleForAddressRange(
    void *handle, unsigned long long pointer, size_t size, int type, unsigned long long flags) {
    if (pointer != 0x7f0000000000ull || size != 1ull << 33 || type != 1 || flags) return 1;
    *(int *)handle = dup(1);
    return 0;
}
#endif
"""
PAGE = os.sysconf("SC_PAGE_SIZE")


def built(folder: Path, *flags: str) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "cuda.c", folder / "libcuda.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, *flags, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def test_the_driver_gets_what_it_declares(tmp_path: Path) -> None:
    found = export(0x7F00_0000_0200, (1 << 33) - PAGE, CudaDriver(built(tmp_path)))
    try:
        assert os.path.samestat(os.fstat(found.fd), os.fstat(1))
    finally:
        os.close(found.fd)
    assert found.offset == 512


def test_what_the_driver_refuses_is_named(tmp_path: Path) -> None:
    driver = CudaDriver(built(tmp_path))
    with pytest.raises(TransportUnavailable, match="cuPointerGetAttribute failed with 1"):
        export(4096, 4096, driver)


def test_a_driver_that_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_BROKEN", "1")
    with pytest.raises(TransportUnavailable, match="cuInit failed with 999"):
        CudaDriver(built(tmp_path))


def test_an_old_driver_is_named(tmp_path: Path) -> None:
    driver = CudaDriver(built(tmp_path, "-DOLD"))
    with pytest.raises(TransportUnavailable, match=r"too old.*cuMemGetHandleForAddressRange"):
        export(0x7F00_0000_0200, 4096, driver)
