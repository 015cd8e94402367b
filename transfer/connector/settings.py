"""The connector's settings: ``kv_connector_extra_config`` of vLLM's ``kv_transfer_config``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    model_parallel_is_initialized,
)

from transfer.connector.block_settings import TRANSFER_KEYS, BlockSettings, read_transfer
from transfer.errors import ConfigurationError, Phase
from transfer.mooncake.config import ROLE_VARIABLE, MooncakeSettings, own_end, worker_settings
from transfer.mooncake.file import PATH_VARIABLE, is_own_address, mooncake_from, read_mooncake
from transfer.settings import TransferSettings

_KEYS = ("discovery", "transfer", "host_staging", "die_with_parent")
_STAGING = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """Settings of one connector.

    Attributes:
        discovery: for :func:`transfer.discovery.make_discovery`.
        transfer: for the transfer engine.
        blocks: what else is set under ``transfer``.
        host_staging: ``auto``: KV blocks in device memory go through slots in host memory, see
            ``blocks.host_staging_bytes``, unless RDMA devices reach them where they are;
            ``always``: all do, those in host memory too; ``never``: the engine does not start if
            they would.
        die_with_parent: whether the engine's processes end with the one that started them.
    """

    discovery: Mapping[str, Any] = field(default_factory=dict)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    blocks: BlockSettings = field(default_factory=BlockSettings)
    host_staging: str = "auto"
    die_with_parent: bool = False

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any], kv_role: str = "") -> Self:
        """Reads ``{"discovery": {...}, "transfer": {...}}``.

        In place of ``discovery`` there may be a file of Mooncake's, named by
        ``transfer.mooncake_config`` or by ``MOONCAKE_CONFIG_PATH``; settings that are given here
        come before those of the file.

        Args:
            kv_role: vLLM's. Tells, like ``VLLM_DISTRIBUTED_KV_ROLE`` where it does not, which of a
                file's two nodes this one is.

        Raises:
            ConfigurationError: an unknown key, a wrong type, or neither ``discovery`` nor a file;
                a file that is wrong.
        """
        unknown = sorted(set(extra) - set(_KEYS))
        if unknown:
            raise _bad(f"kv_connector_extra_config.{unknown[0]} is unknown; known: {_KEYS}")
        for name in ("discovery", "transfer"):
            if not isinstance(extra.get(name) or {}, Mapping):
                raise _bad(f"kv_connector_extra_config.{name} must be a mapping")
        if type(extra.get("die_with_parent", False)) is not bool:
            raise _bad("kv_connector_extra_config.die_with_parent must be true or false")
        if extra.get("host_staging", "auto") not in _STAGING:
            raise _bad(f"kv_connector_extra_config.host_staging must be one of {_STAGING}")
        transfer = dict(extra.get("transfer") or {})
        discovery = extra.get("discovery")
        path = transfer.pop("mooncake_config", "")
        if path and discovery:
            raise _bad(
                "kv_connector_extra_config has both discovery and transfer.mooncake_config; "
                "give one of them"
            )
        for name in transfer:
            if name not in TRANSFER_KEYS:
                raise _bad(
                    f"kv_connector_extra_config.transfer.{name} is unknown; "
                    f"known: {', '.join(TRANSFER_KEYS)}"
                )
        if not discovery:
            mooncake = _from_mooncake(path, kv_role)
            if mooncake is None:
                raise _bad(
                    "kv_connector_extra_config.discovery is missing; it should say how peers are "
                    'found, for example {"kind": "etcd", "endpoints": ["127.0.0.1:2379"]}; or let '
                    f"{PATH_VARIABLE} name a mooncake.json"
                )
            discovery, transfer = mooncake.discovery, {**mooncake.transfer, **transfer}
        engine, blocks = read_transfer(transfer)
        return cls(
            discovery=dict(discovery),
            transfer=engine,
            blocks=blocks,
            host_staging=extra.get("host_staging", "auto"),
            die_with_parent=extra.get("die_with_parent", False),
        )


def _from_mooncake(path: str, kv_role: str) -> MooncakeSettings | None:
    config = read_mooncake(path) if path else mooncake_from(os.environ)
    if config is None:
        return None
    role = kv_role.removeprefix("kv_")
    if role not in ("producer", "consumer"):
        role = os.environ.get(ROLE_VARIABLE, "")
    end = own_end(config, role, is_own_address)
    # Only the worker listens, and where the scheduler runs apart there are no ranks.
    rank = get_tensor_model_parallel_rank() if model_parallel_is_initialized() else 0
    return worker_settings(config, end, rank)


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
