"""An application's settings that are right, and what is said of wrong ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from serve_app.config import SettingsError, parse_settings

GOOD: dict[str, Any] = {
    "model": {"id": "demo", "source": "baton-demo"},
    "engine": {"dtype": "bfloat16", "block_size": 32},
    "prefill": {"replicas": 2, "engine": {"max_num_seqs": 4}, "env": {"A": "1"}},
    "decode": {"autoscaling": {"min_replicas": 1, "max_replicas": 3}},
    "transfer": {"streams_per_peer": 4, "ticket_ttl_s": 10},
    "discovery": {"kind": "etcd", "endpoints": ["127.0.0.1:2379"], "cluster": "demo"},
    "router": {"api_keys": ["${BATON_KEY}", "file:/run/secrets/key"], "attempts": 2},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """``GOOD`` with one key set; ``None`` removes it."""
    args = copy.deepcopy(GOOD)
    *sections, last = path.split(".")
    place = args
    for section in sections:
        place = place.setdefault(section, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return args


def faults(args: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse_settings(args)
    return str(caught.value).splitlines()


def fault(args: Any) -> str:
    (line,) = faults(args)
    return line
