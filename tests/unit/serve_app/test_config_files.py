"""Files that settings come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import SettingsError, parse_settings
from serve_app.config_file import IMPORT_PATH, load_document, load_settings
from tests.support.servers.app_settings import GOOD, changed, fault

# ---- files ---------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_settings_are_loaded_from_the_application_that_is_baton(tmp_path: Path) -> None:
    document = {
        "http_options": {"port": 8000},
        "applications": [
            "not even a mapping",
            {"name": "other", "import_path": "other.app:build"},
            {"name": "baton", "import_path": IMPORT_PATH, "args": GOOD},
        ],
    }
    file = write(tmp_path, yaml.safe_dump(document))

    assert load_settings(file) == parse_settings(GOOD)
    assert load_settings(str(file)) == parse_settings(GOOD)
    assert load_document(file)["http_options"] == {"port": 8000}


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.yaml: there is no such file"):
        load_settings(tmp_path / "missing.yaml")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "is not YAML"),
        ("", "a Serve config with a list `applications` is expected"),
        ("- applications", "a Serve config with a list `applications` is expected"),
        ("model: {id: m}", "a Serve config with a list `applications` is expected"),
        ("applications: {}", "a Serve config with a list `applications` is expected"),
        ("applications: []", f"no application has import_path: {IMPORT_PATH}"),
        ("applications: [{import_path: 'a:b'}]", f"no application has import_path: {IMPORT_PATH}"),
        (f"applications: [{{import_path: '{IMPORT_PATH}'}}]", "args: "),
        (f"applications: [{{import_path: '{IMPORT_PATH}', args: {{}}}}]", "model: Field required"),
    ],
)
def test_file_with_something_else_in_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, text))
    assert message in str(caught.value)


# ---- mooncake.json -------------------------------------------------------------------------------


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.json"
    path.write_text(
        json.dumps(
            {
                "local_url": "10.0.0.1:13003",
                "remote_url": "10.0.0.2:13003",
                "metadata_server": "10.0.0.2:2379,10.0.0.3:2379",
                "protocol": "rdma",
                "device_name": "mlx5_0,mlx5_1",
            }
        )
    )
    return path


def without_discovery(**transfer: Any) -> dict[str, Any]:
    return {"model": GOOD["model"], "transfer": transfer}


def test_mooncake_file_says_discovery_and_transport(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_key = parse_settings(without_discovery(mooncake_config=str(mooncake), slice_bytes=4096))
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))
    by_variable = parse_settings(without_discovery(slice_bytes=4096))

    assert by_key == by_variable
    assert by_key.discovery == {"kind": "etcd", "endpoints": ["10.0.0.2:2379", "10.0.0.3:2379"]}
    assert by_key.transfer == {
        "transports": ["rdma"],
        "rdma_device": "mlx5_0,mlx5_1",
        "slice_bytes": 4096,
    }


def test_discovery_in_the_configuration_comes_before_the_variable(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(mooncake))

    assert parse_settings(GOOD).discovery == GOOD["discovery"]


def test_faults_of_a_mooncake_file_are_named(mooncake: Path) -> None:
    mooncake.write_text(json.dumps({"local_url": "10.0.0.1", "metadata_server": "P2PHANDSHAKE"}))
    with pytest.raises(SettingsError) as caught:
        parse_settings(without_discovery(mooncake_config=str(mooncake)))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{mooncake}: local_url: is '10.0.0.1'")
    assert second.startswith(f"{mooncake}: remote_url: is missing")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (without_discovery(mooncake_config=7), "transfer.mooncake_config: is 7, must be the path"),
        (without_discovery(mooncake_config=""), "transfer.mooncake_config: is '', must be the"),
        (without_discovery(mooncake_config="/no/file"), "/no/file: cannot be read: No such file"),
        (changed("transfer.mooncake_config", "m.json"), "discovery: cannot stand beside"),
    ],
)
def test_wrong_use_of_a_mooncake_file_is_named(args: dict[str, Any], named: str) -> None:
    assert fault(args).startswith(named)
