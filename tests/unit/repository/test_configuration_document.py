"""docs/configuration.md lists every setting, with its default, and none that does not exist."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serve_app.app import llm_config
from serve_app.config import Settings, SideSettings, parse_settings
from transfer.connector.block_settings import BlockSettings
from transfer.discovery import check_discovery
from transfer.discovery.settings import EtcdSettings
from transfer.errors import ConfigurationError
from transfer.settings import TransferSettings

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"
REQUIRED = "required"
# Not models: their keys and defaults stand in transfer/discovery.
STATIC = {
    "discovery.kind": REQUIRED,
    "discovery.peers": [],
    "discovery.peers.engine_id": REQUIRED,
    "discovery.peers.addresses": REQUIRED,
    "discovery.peers.role": REQUIRED,
    "discovery.peers.rank": 0,
    "discovery.peers.tp_size": 1,
    # Stands for others.
    "transfer.mooncake_config": "",
}

# The application is imported here, and with it vLLM.
pytestmark = pytest.mark.timeout(90)


def _documented() -> dict[str, str]:
    """Key -> what the column `default` says."""
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE
    )
    keys = [key for key, _ in rows]
    assert len(keys) == len(set(keys)), "a key is listed twice"
    return {key: default.strip() for key, default in rows}


def _existing() -> dict[str, Any]:
    """Key -> its default."""
    found = dict(STATIC)
    for name, info in Settings.model_fields.items():
        if name in ("prefill", "decode"):
            continue
        if name in ("transfer", "discovery"):
            continue  # opaque here; their keys come from their own classes
        section = _section(info)
        found.update({name: _default(info)} if section is None else _keys(section, name))
    found.update(_keys(SideSettings, "side"))
    for cls, prefix in (
        (TransferSettings, "transfer"),
        (BlockSettings, "transfer"),
        (EtcdSettings, "discovery"),
    ):
        for item in dataclasses.fields(cls):
            required = item.default is dataclasses.MISSING
            found[f"{prefix}.{item.name}"] = REQUIRED if required else item.default
    # The application's own default, which differs from a stock vLLM server's.
    found["transfer.host"] = _applied_transfer()["host"]
    return found


def _keys(section: type[BaseModel], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        key = f"{prefix}.{name}"
        found[key] = _default(info)
        inner = _section(info)
        if inner is not None:
            found.update(_keys(inner, key))
    return found


def _section(info: FieldInfo) -> type[BaseModel] | None:
    kinds = (
        typing.get_args(info.annotation)
        if isinstance(info.annotation, types.UnionType)
        else (info.annotation,)
    )
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sections[0] if sections else None


def _default(info: FieldInfo) -> Any:
    value = info.get_default(call_default_factory=True, validated_data={})
    return REQUIRED if value is PydanticUndefined else value


def _applied_transfer() -> dict[str, Any]:
    settings = parse_settings(
        {"model": {"id": "m", "source": "m"}, "discovery": {"kind": "static"}}
    )
    kwargs = llm_config(settings, "decode").engine_kwargs
    applied: dict[str, Any] = kwargs["kv_transfer_config"]["kv_connector_extra_config"]["transfer"]
    return applied


def test_every_key_is_documented() -> None:
    missing = set(_existing()) - set(_documented())
    assert not missing, f"add to {DOCUMENT.name}: {', '.join(sorted(missing))}"


def test_no_documented_key_is_imaginary() -> None:
    surplus = set(_documented()) - set(_existing())
    assert not surplus, f"remove from {DOCUMENT.name}: {', '.join(sorted(surplus))}"


def test_every_section_has_a_heading() -> None:
    text = DOCUMENT.read_text()
    for name in Settings.model_fields:
        assert re.search(rf"^## .*`{name}`", text, re.MULTILINE), name


def test_defaults_are_the_real_ones() -> None:
    existing = _existing()
    for key, text in _documented().items():
        default = existing[key]
        if isinstance(default, BaseModel):
            continue  # its keys have rows of their own
        written = text.strip("`")
        if default is None:
            assert written == "none", key
        elif default == "":
            assert written == "empty", key
        elif default == REQUIRED:
            assert written == REQUIRED, key
        else:
            assert yaml.safe_load(written) == default, key


def test_the_documented_kinds_of_discovery_exist() -> None:
    for kind, keys in (
        ("etcd", {"endpoints": ["127.0.0.1:2379"]}),
        (
            "static",
            {
                "peers": [
                    {"engine_id": "p", "addresses": ["tcp://10.0.0.11:7000"], "role": "prefill"}
                ]
            },
        ),
    ):
        check_discovery({"kind": kind, **keys})
    with pytest.raises(ConfigurationError, match="etcd, static"):
        check_discovery({"kind": "other"})


def test_its_example_is_accepted() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (application,) = yaml.safe_load(example)["applications"]
    parse_settings(application["args"])
