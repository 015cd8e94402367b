"""Who is alive and where: published records, a local view of them, word of changes.

:func:`make_discovery` makes one from configuration; :mod:`transfer.discovery.base` says what it
promises. The etcd client is imported only when etcd is used.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, cast

from transfer.discovery.base import Discovery
from transfer.discovery.settings import EtcdSettings
from transfer.discovery.static import StaticDiscovery
from transfer.errors import ConfigurationError, Phase
from transfer.types import PeerId, WorkerRecord

_ETCD_KEYS = tuple(field.name for field in fields(EtcdSettings))
_ETCD_TEXTS = ("cluster", "user", "password", "tls_ca", "tls_cert", "tls_key")
_PEER_KEYS = ("engine_id", "rank", "addresses", "role", "tp_size")


def make_discovery(config: Mapping[str, Any]) -> Discovery:
    """Make the discovery that a configuration asks for.

    Args:
        config: ``{"kind": "etcd", "endpoints": ["127.0.0.1:2379"], ...}`` with the fields of
            :class:`~transfer.discovery.settings.EtcdSettings`, or ``{"kind": "static", "peers":
            [{"engine_id": "p0", "rank": 0, "addresses": ["tcp://10.0.0.1:7000"], "role":
            "prefill", "tp_size": 1}]}``; ``rank`` and ``tp_size`` default to 0 and 1.

    Raises:
        ConfigurationError: names the key that is wrong and what would be right, or the package
            that is missing.
    """
    kinds: dict[str, Callable[[Mapping[str, Any]], Discovery]] = {
        "etcd": _make_etcd,
        "static": _make_static,
    }
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise _bad(f"discovery kind is {kind!r:.40}; use one of: {', '.join(kinds)}")
    return kinds[kind]({key: value for key, value in config.items() if key != "kind"})


def check_discovery(config: Mapping[str, Any]) -> None:
    """Check a configuration as :func:`make_discovery` does, without connecting to anything.

    Secrets that it refers to may be on another machine, and are not looked for.

    Raises:
        ConfigurationError: as :func:`make_discovery`.
    """
    if config.get("kind") == "etcd":
        etcd_settings(config)
    else:
        make_discovery(config).close()


def etcd_settings(config: Mapping[str, Any]) -> EtcdSettings:
    """Settings from a configuration of kind ``etcd``.

    Raises:
        ConfigurationError: as :func:`make_discovery`.
    """
    config = {key: value for key, value in config.items() if key != "kind"}
    _refuse_unknown(config, _ETCD_KEYS, "discovery of kind etcd")
    endpoints = config.get("endpoints", ())
    if not isinstance(endpoints, str | list | tuple):
        raise _bad('endpoints is not a list like ["127.0.0.1:2379"]')
    for key in _ETCD_TEXTS:
        if not isinstance(config.get(key, ""), str):
            raise _bad(f"{key} of discovery is not a string")
    return EtcdSettings(**{**config, "endpoints": endpoints})


def _make_etcd(config: Mapping[str, Any]) -> Discovery:
    settings = etcd_settings(config)
    settings.credentials()  # fails now rather than at the first connection
    etcd = importlib.import_module("transfer.discovery.etcd")
    return cast(Discovery, etcd.EtcdDiscovery(settings))


def _make_static(config: Mapping[str, Any]) -> Discovery:
    _refuse_unknown(config, ("peers",), "discovery of kind static")
    peers = config.get("peers", ())
    if not isinstance(peers, list | tuple):
        raise _bad("peers of static discovery is not a list")
    return StaticDiscovery(_static_record(number, peer) for number, peer in enumerate(peers))


def _static_record(number: int, peer: object) -> WorkerRecord:
    where = f"peer {number} of static discovery"
    if not isinstance(peer, Mapping):
        raise _bad(f"{where} is not a mapping with the keys {', '.join(_PEER_KEYS)}")
    _refuse_unknown(peer, _PEER_KEYS, where)
    for key in ("engine_id", "addresses", "role"):
        if key not in peer:
            raise _bad(f"{where} has no {key}")
    addresses = peer["addresses"]
    if not isinstance(addresses, list | tuple):
        raise _bad(f'addresses of {where} is not a list like ["tcp://10.0.0.1:7000"]')
    return WorkerRecord(
        peer=PeerId(peer["engine_id"], peer.get("rank", 0)),
        incarnation="",
        role=peer["role"],
        tp_size=peer.get("tp_size", 1),
        addresses=tuple(addresses),
        layout_hash="",
        started_at_s=0.0,
    )


def _refuse_unknown(config: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise _bad(f"{where} has no key {key!r:.80}; {hint}known keys: {', '.join(known)}")


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.DISCOVER)
