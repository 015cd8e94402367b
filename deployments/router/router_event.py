"""What a router counts."""

from __future__ import annotations

from enum import Enum


class RouterEvent(Enum):
    """Something out of the ordinary that a router met with."""

    REFUSED = "refused"
    PREFILL_LOST = "prefill_lost"
    NO_PREFILL = "no_prefill"
    DECODE_LOST = "decode_lost"
    NO_DECODE = "no_decode"
    TICKETS_UNREAD = "tickets_unread"
    STREAM_RESUMED = "stream_resumed"
    STREAM_BROKEN = "stream_broken"
    SUSPECT_TRIED = "suspect_tried"
    CONDEMNED = "condemned"
