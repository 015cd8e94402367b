"""Ports of devices and their addresses."""

from __future__ import annotations

from dataclasses import dataclass

# Of ``ibv_gid_entry``; neither build of pyverbs has names for them.
GID_IB, GID_ROCE_V1, GID_ROCE_V2 = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's table of addresses."""

    index: int
    kind: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Port:
    """What a device says of one of its ports.

    Attributes:
        mtu: as verbs count it, 1 for 256 bytes to 5 for 4096.
        max_message_bytes: longest single read.
    """

    number: int
    active: bool
    ethernet: bool
    lid: int
    mtu: int
    max_message_bytes: int
    gids: tuple[Gid, ...]
