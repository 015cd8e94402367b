"""CUDA memory for RDMA devices: the driver exports it as a dma-buf.

Names, numbers and rules are those of the CUDA driver API (``cuda.h``), from 11.7 on. Nothing of
CUDA need be installed to import this.
"""

from __future__ import annotations

import ctypes
import os
from typing import Protocol

from transfer.errors import Phase, TransportUnavailable
from transfer.types import DmaBuf

_LIBRARY = "libcuda.so.1"

_POINTER_DEVICE = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_WRITES_ORDERING = 118  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
_DMA_BUF_SUPPORTED = 124  # CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
_ORDERED_FOR_OWNER = 100  # CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
_AS_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD


class Driver(Protocol):
    """What is asked of CUDA. Methods raise ``TransportUnavailable`` when it says no."""

    def device_of(self, address: int) -> int:
        """The ordinal of the device whose memory that is."""
        ...

    def attribute(self, device: int, number: int) -> int: ...

    def dmabuf_fd(self, address: int, length: int) -> int:
        """A new descriptor for whole pages of memory."""
        ...


def export(address: int, length: int, driver: Driver | None = None) -> DmaBuf:
    """Memory of a CUDA device, for :meth:`TransferEngine.register`.

    On a thread whose current CUDA context is that of the memory. The memory may be any part of one
    allocation. Before an offer of it, its owner has to wait for the kernels that write it; and a
    reader, before it reads into it, for those that still use it.

    Returns:
        with a descriptor that the caller closes, after the region.

    Raises:
        TransportUnavailable: there is no CUDA, its driver does not export this memory, or kernels
            might not see what an RDMA device wrote before they were launched.
    """
    driver = driver or CudaDriver()
    device = driver.device_of(address)
    if not driver.attribute(device, _DMA_BUF_SUPPORTED):
        raise _unavailable(f"device {device} does not export its memory as dma-buf")
    if driver.attribute(device, _WRITES_ORDERING) < _ORDERED_FOR_OWNER:
        raise _unavailable(f"device {device} does not order its kernels after writes by RDMA")
    page = os.sysconf("SC_PAGE_SIZE")
    first, end = address // page * page, -(-(address + length) // page) * page
    return DmaBuf(driver.dmabuf_fd(first, end - first), address - first)


class CudaDriver:
    """The driver of this machine.

    Raises:
        TransportUnavailable: there is none, it is older than 11.7, or it does not start.
    """

    def __init__(self, library: str = _LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise _unavailable(str(error)) from error
        self._call("cuInit", ctypes.c_uint(0))

    def __repr__(self) -> str:
        return f"<CudaDriver {self._library._name}>"

    def device_of(self, address: int) -> int:
        ordinal = ctypes.c_int(-1)
        self._call(
            "cuPointerGetAttribute",
            ctypes.byref(ordinal),
            ctypes.c_int(_POINTER_DEVICE),
            ctypes.c_uint64(address),
        )
        return ordinal.value

    def attribute(self, device: int, number: int) -> int:
        handle, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), handle)
        return value.value

    def dmabuf_fd(self, address: int, length: int) -> int:
        fd = ctypes.c_int(-1)
        self._call(
            "cuMemGetHandleForAddressRange",
            ctypes.byref(fd),
            ctypes.c_uint64(address),
            ctypes.c_size_t(length),
            ctypes.c_int(_AS_DMA_BUF_FD),
            ctypes.c_ulonglong(0),
        )
        return fd.value

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise _unavailable(f"the driver is too old, it has no {name}") from error
        if status := function(*arguments):
            raise _unavailable(f"{name} failed with {status}")


def _unavailable(why: str) -> TransportUnavailable:
    return TransportUnavailable(f"no dma-buf of CUDA memory: {why}", phase=Phase.REGISTER)
