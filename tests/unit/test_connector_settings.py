from __future__ import annotations

from typing import Any

import pytest

from transfer.connector.settings import ConnectorSettings
from transfer.errors import ConfigurationError
from transfer.settings import TransferSettings

GOOD: dict[str, Any] = {
    "discovery": {"kind": "etcd", "endpoints": ["127.0.0.1:2379"]},
    "transfer": {"streams_per_peer": 4},
    "die_with_parent": True,
}


def test_settings_are_read() -> None:
    settings = ConnectorSettings.from_extra_config(GOOD)

    assert settings.discovery == GOOD["discovery"]
    assert settings.transfer == TransferSettings(streams_per_peer=4)
    assert settings.die_with_parent is True


@pytest.mark.parametrize("transfer", [{}, {"transfer": None}, {"transfer": {}}])
def test_all_but_discovery_may_be_left_out(transfer: dict[str, Any]) -> None:
    settings = ConnectorSettings.from_extra_config({"discovery": GOOD["discovery"], **transfer})

    assert settings.transfer == TransferSettings()
    assert settings.die_with_parent is False


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"discover": {}}, "kv_connector_extra_config.discover is unknown"),
        ({"discovery": None}, "kv_connector_extra_config.discovery is missing"),
        ({"discovery": {}}, "kv_connector_extra_config.discovery is missing"),
        ({"discovery": "etcd"}, "kv_connector_extra_config.discovery must be a mapping"),
        ({"transfer": [1]}, "kv_connector_extra_config.transfer must be a mapping"),
        ({"transfer": {"prot": 1}}, "kv_connector_extra_config.transfer.prot is unknown"),
        ({"transfer": {"port": "7000"}}, "port is '7000', must be a whole number"),
        ({"transfer": {"ticket_ttl_s": None}}, "ticket_ttl_s is None, must be from"),
        ({"die_with_parent": "false"}, "kv_connector_extra_config.die_with_parent"),
    ],
)
def test_wrong_setting_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConnectorSettings.from_extra_config({**GOOD, **change})
    assert caught.value.message.startswith(named)
