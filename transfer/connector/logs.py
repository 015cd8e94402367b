"""Has the transfer package log where its engine logs."""

from __future__ import annotations

import logging


def log_with_vllm() -> None:
    """Sends what ``transfer`` logs to vLLM's handlers, at vLLM's level.

    vLLM sets up its own logger only. Does nothing when somebody has set up ours already.
    """
    ours, vllm = logging.getLogger("transfer"), logging.getLogger("vllm")
    if ours.handlers or not vllm.handlers:
        return
    for handler in vllm.handlers:
        ours.addHandler(handler)
    ours.setLevel(vllm.getEffectiveLevel())
    ours.propagate = False
