from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transfer.connector.block_settings import BlockSettings
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


def test_what_concerns_blocks_is_set_beside_what_concerns_transfers() -> None:
    given = {"streams_per_peer": 4, "digests": True, "host_staging_bytes": 1 << 20}

    settings = ConnectorSettings.from_extra_config({**GOOD, "transfer": given})

    assert settings.transfer == TransferSettings(streams_per_peer=4)
    assert settings.blocks == BlockSettings(digests=True, host_staging_bytes=1 << 20)


@pytest.mark.parametrize("transfer", [{}, {"transfer": None}, {"transfer": {}}])
def test_all_but_discovery_may_be_left_out(transfer: dict[str, Any]) -> None:
    settings = ConnectorSettings.from_extra_config({"discovery": GOOD["discovery"], **transfer})

    assert settings.transfer == TransferSettings()
    assert settings.blocks == BlockSettings()
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
        ({"host_staging": "seldom"}, "kv_connector_extra_config.host_staging must be one of"),
        ({"transfer": {"host_staging_bytes": -1}}, "host_staging_bytes is -1, must be a whole"),
        ({"transfer": {"digests": "yes"}}, "digests is 'yes', must be true or false"),
        ({"transfer": {"host": "0.0.0.0"}}, "host is '0.0.0.0', must be an address that leads"),
        ({"transfer": {"port": "7000"}}, "port is '7000', must be a whole number"),
        ({"transfer": {"ticket_ttl_s": None}}, "ticket_ttl_s is None, must be from"),
        ({"die_with_parent": "false"}, "kv_connector_extra_config.die_with_parent"),
    ],
)
def test_wrong_setting_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConnectorSettings.from_extra_config({**GOOD, **change})
    assert caught.value.message.startswith(named)


@pytest.fixture
def mooncake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for two servers on loopback."""
    monkeypatch.setattr("transfer.connector.settings.is_own_address", lambda host: True)
    path = tmp_path / "mooncake.json"
    path.write_text(
        json.dumps(
            {
                "local_url": "127.0.0.1:13003",
                "remote_url": "127.0.0.1:13103",
                "metadata_server": "127.0.0.1:2379",
                "protocol": "tcp",
            }
        )
    )
    return path


def test_a_mooncake_file_stands_in_for_discovery(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DISTRIBUTED_KV_ROLE", "consumer")
    by_key = ConnectorSettings.from_extra_config(
        {"transfer": {"mooncake_config": str(mooncake), "streams_per_peer": 4}}
    )
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))
    by_variable = ConnectorSettings.from_extra_config({"transfer": {"streams_per_peer": 4}})

    assert by_key == by_variable
    assert by_key.discovery == {"kind": "etcd", "endpoints": ["127.0.0.1:2379"]}
    assert by_key.transfer == TransferSettings(
        host="127.0.0.1", port=13103, transports=("tcp",), streams_per_peer=4
    )


@pytest.mark.parametrize(
    ("kv_role", "variable", "port"),
    [
        ("kv_producer", "", 13003),
        ("kv_consumer", "", 13103),
        ("kv_consumer", "producer", 13103),
        ("kv_both", "producer", 13003),
    ],
)
def test_the_role_tells_which_node_of_a_mooncake_file_this_is(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch, kv_role: str, variable: str, port: int
) -> None:
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))
    monkeypatch.setenv("VLLM_DISTRIBUTED_KV_ROLE", variable)
    assert ConnectorSettings.from_extra_config({}, kv_role).transfer.port == port


def test_what_is_set_in_the_connector_comes_before_a_mooncake_file(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))
    given = {"transfer": {"host": "127.0.0.9", "port": 7000, "transports": "auto"}}

    assert ConnectorSettings.from_extra_config(given).transfer == TransferSettings(
        host="127.0.0.9", port=7000
    )
    assert ConnectorSettings.from_extra_config(GOOD).discovery == GOOD["discovery"]
    with pytest.raises(ConfigurationError, match=r"both discovery and transfer\.mooncake_config"):
        ConnectorSettings.from_extra_config(
            {**GOOD, "transfer": {"mooncake_config": str(mooncake)}}
        )
