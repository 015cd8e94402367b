"""Which devices, ports and addresses are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from transfer.errors import ConfigurationError, Phase, TransportUnavailable
from transfer.transports.rdma.verbs.device import OpenDevice, device_names
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.transports.rdma.verbs.port import GID_ROCE_V1, GID_ROCE_V2, Gid, Port

logger = logging.getLogger(__name__)

GID_VARIABLE = "MC_GID_INDEX"
"""Environment variable that other transfer engines read for the same purpose."""

_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_LINK_LOCAL = b"\xfe\x80"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One device as the operator names it: ``name`` or ``name:port``; port 0 is any."""

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class Rail:
    """One device that is used, with the port and the address that its packets leave from."""

    device: OpenDevice
    port: Port
    gid: Gid

    def __str__(self) -> str:
        return f"{self.device.name}:{self.port.number}"


def parse_devices(text: str) -> list[Wanted]:
    """Read the setting ``rdma_device``.

    Raises:
        ConfigurationError: it is not a list of names, each with or without a port.
    """
    wanted = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, port = part.partition(":")
        if not name or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 256)):
            raise ConfigurationError(
                f"rdma_device has {part!r:.80}, must be device names with commas between, each "
                "with or without :port",
                phase=Phase.REGISTER,
            )
        wanted.append(Wanted(name, int(port or 0)))
    return wanted


def gid_index_wanted(setting: int, environment: Mapping[str, str]) -> int:
    """Index that the settings or the environment ask for; -1 for the best.

    Raises:
        ConfigurationError: the environment variable is not a number.
    """
    text = environment.get(GID_VARIABLE, "")
    if setting >= 0 or not text:
        return setting
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise ConfigurationError(
            f"{GID_VARIABLE} is {text!r:.80}, must be a whole number", phase=Phase.REGISTER
        )
    return int(text)


def rank_of(port: Port, gid: Gid) -> int:
    """How well an address suits; 0 is best. Routable RoCE v2 goes through any network."""
    if not any(gid.raw):
        return 99
    if not port.ethernet:
        return gid.index
    if gid.kind == GID_ROCE_V2:
        if gid.raw.startswith(_IPV4_MAPPED):
            return 0
        return 2 if gid.raw.startswith(_LINK_LOCAL) else 1
    return 3 if gid.kind == GID_ROCE_V1 else 4


def choose_gid(port: Port, index: int) -> Gid | None:
    """The address with ``index``, or the best one when that is -1; None if there is none."""
    if index >= 0:
        return next((gid for gid in port.gids if gid.index == index), None)
    usable = [gid for gid in port.gids if any(gid.raw)]
    return min(usable, key=lambda gid: (rank_of(port, gid), gid.index), default=None)


def choose_port(ports: list[Port], number: int, gid_index: int) -> tuple[Port, Gid] | None:
    """The port with ``number``, or the best active one when that is 0, and its address."""
    found = [
        (port, gid)
        for port in ports
        if port.active
        and number in (0, port.number)
        and (gid := choose_gid(port, gid_index)) is not None
    ]
    return min(found, key=lambda pair: (rank_of(*pair), pair[0].number), default=None)


def open_rails(device_setting: str, gid_index: int) -> list[Rail]:
    """Open the devices that the settings name, or the best one if they name none.

    Raises:
        ConfigurationError: a named device is not there, or has no port that could be used.
        TransportUnavailable: none was named and there is none, or pyverbs is missing.
    """
    wanted = parse_devices(device_setting)
    there = device_names()
    if not wanted:
        return [_best_rail(there, gid_index)]
    rails: list[Rail] = []
    whole = False
    try:
        for one in wanted:
            if one.name not in there:
                raise ConfigurationError(
                    f"rdma_device names {one.name}, but this machine has "
                    f"{', '.join(there) or 'no RDMA device'}",
                    phase=Phase.REGISTER,
                )
            rail = _open(one, gid_index)
            if rail is None:
                raise ConfigurationError(
                    f"{one.name} has no active port{_numbered(one.port or -1)} with an address"
                    f"{_numbered(gid_index)}",
                    phase=Phase.REGISTER,
                )
            rails.append(rail)
        whole = True
        return rails
    finally:
        if not whole:
            close_rails(rails)


def close_rails(rails: list[Rail]) -> None:
    """Close every device once; the log says which cannot be."""
    for device in {id(rail.device): rail.device for rail in rails}.values():
        _close(device)


def _best_rail(names: list[str], gid_index: int) -> Rail:
    if not names:
        raise TransportUnavailable("this machine has no RDMA device", phase=Phase.CONNECT)
    best: Rail | None = None
    for name in names:
        rail = _open(Wanted(name, 0), gid_index)
        if rail is None:
            continue
        if best is None or rank_of(rail.port, rail.gid) < rank_of(best.port, best.gid):
            best, rail = rail, best
        if rail is not None:
            _close(rail.device)
    if best is None:
        raise TransportUnavailable(
            f"no port of {', '.join(names)} is active and has an address{_numbered(gid_index)}",
            phase=Phase.CONNECT,
        )
    return best


def _open(wanted: Wanted, gid_index: int) -> Rail | None:
    try:
        device = OpenDevice(wanted.name)
    except VerbsError as error:
        raise TransportUnavailable(
            f"{wanted.name} cannot be opened: {error}", phase=Phase.CONNECT
        ) from error
    chosen = None
    try:
        chosen = choose_port(device.ports(), wanted.port, gid_index)
    except VerbsError as error:
        raise TransportUnavailable(
            f"{wanted.name} cannot be queried: {error}", phase=Phase.CONNECT
        ) from error
    finally:
        if chosen is None:
            _close(device)
    return None if chosen is None else Rail(device, *chosen)


def _close(device: OpenDevice) -> None:
    try:
        device.close()
    except VerbsError as error:  # nobody could do more, and the others are to go
        logger.warning("%s stays open: %s", device.name, error)


def _numbered(index: int) -> str:
    return f" {index}" if index >= 0 else ""
