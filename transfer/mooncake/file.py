"""Finds and reads ``mooncake.json``; :mod:`transfer.mooncake.config` says what is in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

from transfer.errors import ConfigurationError, Phase
from transfer.mooncake.config import MooncakeConfig, parse_mooncake

PATH_VARIABLE = "MOONCAKE_CONFIG_PATH"


def read_mooncake(path: str | Path) -> MooncakeConfig:
    """Reads one file.

    Raises:
        ConfigurationError: it cannot be read, or is wrong; one line for each fault.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _bad(f"{path}: is not JSON: {error}") from error
    return parse_mooncake(document, str(path))


def mooncake_from(environment: Mapping[str, str]) -> MooncakeConfig | None:
    """The file that ``MOONCAKE_CONFIG_PATH`` names; None if it names none.

    Raises:
        ConfigurationError: as :func:`read_mooncake`.
    """
    path = environment.get(PATH_VARIABLE, "")
    return read_mooncake(path) if path else None


def is_own_address(host: str) -> bool:
    """Whether ``host`` is an address of this machine, or a name of one. May ask a name server."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
