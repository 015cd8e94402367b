"""``baton vllm-serve``: vLLM's own OpenAI server, with Baton's connector filled in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from transfer.addressing import host_and_port, is_every_address
from transfer.errors import ConfigurationError, Phase
from transfer.mooncake.config import ROLE_VARIABLE, own_end, worker_settings
from transfer.mooncake.file import PATH_VARIABLE, is_own_address, mooncake_from

MODULE: Final = "vllm.entrypoints.openai.api_server"
"""What the ``vllm`` command runs; works with distributions that lack the command."""

_OPTION: Final = "--kv-transfer-config"
_DEFAULT_PORT: Final = "8000"


def server_arguments(
    arguments: Sequence[str], environment: Mapping[str, str], is_own: Callable[[str], bool]
) -> list[str]:
    """``arguments`` with ``--kv-transfer-config``, unless they have it already.

    Args:
        is_own: whether a host is an address of this machine.

    Raises:
        ConfigurationError: the role or ``mooncake.json`` is missing or wrong.
    """
    given = [argument.replace("_", "-") for argument in arguments]
    if any(name in ("-h", "--help") or name.startswith(_OPTION) for name in given):
        return list(arguments)
    role = environment.get(ROLE_VARIABLE, "")
    if role not in ("producer", "consumer"):
        raise _bad(
            f"{ROLE_VARIABLE} is {role!r:.40}, must be producer (prefill) or consumer (decode); "
            f"or give {_OPTION}"
        )
    config = mooncake_from(environment)
    if config is None:
        raise _bad(f"{PATH_VARIABLE} is not set, must name a mooncake.json; or give {_OPTION}")
    host = str(worker_settings(config, own_end(config, role, is_own), 0).transfer["host"])
    return [*arguments, _OPTION, json.dumps(_connector(role, _http_url(arguments, host)))]


def vllm_serve(arguments: Sequence[str]) -> NoReturn:
    """Becomes vLLM's server.

    Raises:
        ConfigurationError: as :func:`server_arguments`.
    """
    full = server_arguments(arguments, os.environ, is_own_address)
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *full])


def _connector(role: str, http_url: str) -> dict[str, Any]:
    return {
        "kv_connector": "BatonConnector",
        "kv_connector_module_path": "transfer.connector",
        "kv_role": f"kv_{role}",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"transfer": {"http_url": http_url}},
    }


def _http_url(arguments: Sequence[str], own_host: str) -> str:
    """Where the server will be reached."""
    host = _value(arguments, "--host")
    if not host or is_every_address(host):
        host = own_host
    port = _value(arguments, "--port") or _DEFAULT_PORT
    scheme = "https" if _value(arguments, "--ssl-certfile") else "http"
    return f"{scheme}://{host_and_port(host, port)}"


def _value(arguments: Sequence[str], option: str) -> str:
    """The option's last value, written with a blank or with ``=``; empty if it is not there."""
    value = ""
    for position, argument in enumerate(arguments):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == option:
            value = rest if equals else next(iter(arguments[position + 1 : position + 2]), "")
    return value


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
