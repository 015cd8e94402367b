"""Puts what a ``mooncake.json`` says into the ``args`` of config.yaml."""

from __future__ import annotations

import os
from typing import Any

from transfer.errors import ConfigurationError, Phase
from transfer.mooncake.config import cluster_settings
from transfer.mooncake.file import mooncake_from, read_mooncake


def with_mooncake(args: Any) -> Any:
    """``args`` with ``discovery`` and ``transfer`` as the file says; as they are without one.

    The file is named by ``transfer.mooncake_config``, or by ``MOONCAKE_CONFIG_PATH`` if there is no
    ``discovery``. Keys of ``transfer`` that are given come before what the file says.

    Raises:
        ConfigurationError: the file is wrong, one line for each fault; or there is ``discovery``
            beside it.
    """
    if not isinstance(args, dict) or not isinstance(args.get("transfer") or {}, dict):
        return args
    transfer = dict(args.get("transfer") or {})
    path = transfer.pop("mooncake_config", None)
    if path is None:
        config = None if "discovery" in args else mooncake_from(os.environ)
    elif not isinstance(path, str) or not path:
        raise _bad(f"transfer.mooncake_config: is {path!r:.60}, must be the path of a file")
    elif "discovery" in args:
        raise _bad("discovery: cannot stand beside transfer.mooncake_config; remove one of them")
    else:
        config = read_mooncake(path)
    if config is None:
        return args
    told = cluster_settings(config)
    return {**args, "discovery": told.discovery, "transfer": {**told.transfer, **transfer}}


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
