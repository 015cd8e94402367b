"""What a client must not say, and within which numbers it must stay. Pure; needs no engine.

The ingress and ``baton proxy`` both ask :func:`refusal` before anything else sees a request: what
is behind them may rely on it. Fields have OpenAI's names, whether parsed by a model or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PRIORITY_HEADER = "x-vllm-priority"

_RESERVED = frozenset(
    {
        # Tickets, and what else Baton's replicas tell each other about a request.
        *("kv_transfer_params", "sent_token_ids", "do_remote_prefill", "do_remote_decode"),
        # The same for encoders that vLLM keeps apart from the model; nothing here speaks it.
        "ec_transfer_params",
    }
)
_INT64 = range(-(1 << 63), 1 << 63)
"""What the engine's messages hold."""


class Fault(NamedTuple):
    """What is wrong with a request.

    Attributes:
        param: the field, or the header.
        message: for the client; begins with ``param``.
    """

    param: str
    message: str


def refusal(fields: Mapping[str, Any], headers: Mapping[str, str]) -> Fault | None:
    """Why a request must not be passed on; None if it may.

    Args:
        fields: of the body, those that the API does not know included.
        headers: of the HTTP request; looked up by lower-case name.
    """
    extra = fields.get("vllm_xargs")
    places = [("", fields), ("vllm_xargs.", extra if isinstance(extra, Mapping) else {})]
    for place, names in places:
        for name, value in names.items():
            if _plain(name) in _RESERVED and (place or value is not None):
                return _fault(f"{place}{name}", "only Baton itself may set it")
    for where, priority in (
        ("priority", fields.get("priority")),
        (PRIORITY_HEADER, _whole(headers.get(PRIORITY_HEADER, ""))),
    ):
        if type(priority) is int and priority not in _INT64:
            return _fault(where, "it must be a whole number of at most 64 bits")
    return None


def _fault(param: str, what: str) -> Fault:
    return Fault(param, f"{param}: {what}")


def _plain(name: str) -> str:
    """A name as another program might read it that is not strict about spelling."""
    return name.strip().casefold().replace("-", "_")


def _whole(text: str) -> int | None:
    """The number that vLLM would read, or one that is out of range if it has too many digits."""
    digits = text.strip().lstrip("+-").replace("_", "")
    if not digits.isdecimal():
        return None
    return int(digits) if len(digits) <= 20 else _INT64.stop
