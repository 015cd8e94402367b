"""What ``baton vllm-serve`` makes of its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app import cli, vllm_serve
from serve_app.vllm_serve import server_arguments
from transfer.connector.settings import ConnectorSettings
from transfer.errors import ConfigurationError

ARGUMENTS = ["--model", "m", "--port", "8100", "--max-model-len", "10000", "-tp", "2"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "mooncake.json"
    path.write_text(
        json.dumps(
            {
                "local_url": "10.0.0.1:13003",
                "remote_url": "10.0.0.2:13003",
                "metadata_server": "10.0.0.2:2379",
                "protocol": "tcp",
            }
        )
    )
    return {"MOONCAKE_CONFIG_PATH": str(path), "VLLM_DISTRIBUTED_KV_ROLE": "producer"}


def filled_in(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The argument that is added; all others stay as they are."""
    *others, option, value = server_arguments(arguments, environment, "10.0.0.1".__eq__)
    assert others == arguments
    assert option == "--kv-transfer-config"
    config: dict[str, Any] = json.loads(value)
    return config


def test_the_argument_is_filled_in(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = filled_in(ARGUMENTS, environment)

    assert config.pop("kv_connector_extra_config") == {
        "transfer": {"http_url": "http://10.0.0.1:8100"}
    }
    assert config == {
        "kv_connector": "BatonConnector",
        "kv_connector_module_path": "transfer.connector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
    }


def test_the_connector_takes_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("transfer.connector.settings.is_own_address", "10.0.0.1".__eq__)
    extra = filled_in(ARGUMENTS, environment)["kv_connector_extra_config"]

    settings = ConnectorSettings.from_extra_config(extra)

    assert settings.transfer.http_url == "http://10.0.0.1:8100"
    assert (settings.transfer.host, settings.transfer.port) == ("10.0.0.1", 13003)


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ([], "http://10.0.0.1:8000"),
        (["--port=8200"], "http://10.0.0.1:8200"),
        (["--port", "1", "--port", "8200"], "http://10.0.0.1:8200"),
        (["--host", "0.0.0.0"], "http://10.0.0.1:8000"),
        (["--host", "0"], "http://10.0.0.1:8000"),
        (["--host=node-a", "--port", "8200"], "http://node-a:8200"),
        (["--host", "fd00::1"], "http://[fd00::1]:8000"),
        (["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"], "https://10.0.0.1:8000"),
    ],
)
def test_peers_are_told_where_the_server_is(
    arguments: list[str], url: str, environment: dict[str, str]
) -> None:
    config = filled_in(arguments, {**environment, "VLLM_DISTRIBUTED_KV_ROLE": "consumer"})

    assert config["kv_role"] == "kv_consumer"
    assert config["kv_connector_extra_config"]["transfer"]["http_url"] == url


@pytest.mark.parametrize(
    "given",
    [
        ["--kv-transfer-config", "{}"],
        ["--kv-transfer-config={}"],
        ["--kv_transfer_config", "{}"],
        ["--kv-transfer-config.kv_role", "kv_both"],
        ["--help"],
    ],
)
def test_an_argument_that_is_given_stays(given: list[str]) -> None:
    assert server_arguments([*ARGUMENTS, *given], {}, bool) == [*ARGUMENTS, *given]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"VLLM_DISTRIBUTED_KV_ROLE": ""}, "VLLM_DISTRIBUTED_KV_ROLE is '', must be producer"),
        ({"VLLM_DISTRIBUTED_KV_ROLE": "both"}, "VLLM_DISTRIBUTED_KV_ROLE is 'both', must be"),
        ({"MOONCAKE_CONFIG_PATH": ""}, "MOONCAKE_CONFIG_PATH is not set"),
        ({"MOONCAKE_CONFIG_PATH": "/no/m.json"}, "/no/m.json: cannot be read"),
    ],
)
def test_what_is_missing_is_named(
    change: dict[str, str],
    message: str,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        server_arguments(ARGUMENTS, environment | change, bool)
    assert caught.value.message.startswith(message)

    for name, value in (environment | change).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["vllm-serve", *ARGUMENTS]) == 1
    assert capsys.readouterr().err.startswith(f"baton: {message}")


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(vllm_serve, "vllm_serve", lambda rest: seen.append(list(rest)))
    rest = ["--model", "m", "--help", "-O.level=3", "--seed", "-1", "--config", "c.yaml"]

    cli.main(["vllm-serve", *rest])

    assert seen == [rest]
