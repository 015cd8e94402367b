"""vLLM's processes sleep between looks for a message, where they would spin.

The engines of two ranks each and their schedulers are six processes that wait in a loop of
``sched_yield`` for a second after every message. On two processors, beside other load, such a host
was seen to leave all of them, etcd's threads included, without a processor for 15 to 30 s. Leases
are lost by that, and reads given up: right, but not what tests of ranks are about.
"""

from __future__ import annotations

import time

from vllm.distributed.device_communicators import shm_broadcast

NAP_S = 0.0005


def nap_instead_of_spinning() -> None:
    """From now on, in this process."""
    shm_broadcast.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP_S)
