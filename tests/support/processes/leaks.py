"""What a test must have given back when it is over: descriptors, threads, RDMA resources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.support.processes.waiting import wait_until

_KINDS = ("pd", "cq", "qp", "mr", "ctx")


@contextmanager
def nothing_left(*, rdma: bool) -> Iterator[None]:
    """Fails unless, soon after the block, no more is held than before.

    Args:
        rdma: also protection domains, completion queues, queue pairs, registered regions and
            contexts, of all processes. Needs a device and the ``rdma`` tool.
    """
    descriptors, threads = len(open_descriptors()), set(threading.enumerate())
    resources = rdma_resources() if rdma else {}
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    assert wait_until(lambda: len(open_descriptors()) <= descriptors), open_descriptors()
    if rdma:
        assert wait_until(lambda: rdma_resources() == resources), (resources, rdma_resources())


def open_descriptors() -> dict[str, str]:
    """Descriptors of this process, and what each is open on."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # that of the listing itself, or closed meanwhile
            continue
    return found


def rdma_resources() -> Mapping[str, int]:
    """Queue pairs, registered regions and the like that exist, over all devices and processes.

    Raises:
        RuntimeError: the ``rdma`` tool is missing.
    """
    tool = shutil.which("rdma", path="/usr/bin:/usr/sbin:/sbin")
    if tool is None:
        raise RuntimeError(
            "whether RDMA resources leak is counted by the rdma tool, which is not there: "
            "install iproute2 (make test-rdma does)"
        )
    shown = subprocess.run([tool, "-j", "resource", "show"], capture_output=True, check=True)
    held = dict.fromkeys(_KINDS, 0)
    for device in json.loads(shown.stdout or "[]"):
        for kind in _KINDS:
            held[kind] += int(device.get(kind, 0))
    return held
