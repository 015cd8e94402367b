"""The cluster files: Ray's own schema check, and that their parts agree with each other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.utils import call_function_from_import_path

CHECKOUT = Path(__file__).resolve().parents[3]
ON_PREMISES = "cluster.yaml"
AWS = "examples/cluster-aws.yaml"
BOTH = (ON_PREMISES, AWS)
SIDES = {"baton_prefill", "baton_decode"}


def _load(file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHECKOUT / file).read_text())
    return loaded


def _prepared(file: str) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(_load(file)))
    return prepared


@pytest.mark.parametrize("file", BOTH)
def test_ray_accepts_it(file: str) -> None:
    validate_config(_prepared(file))


@pytest.mark.parametrize("file", BOTH)
def test_all_code_is_copied_and_the_token_with_it(file: str) -> None:
    mounts = _load(file)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    for remote, local in mounts.items():
        assert remote == f"~/baton/{local}"
        assert (CHECKOUT / local).exists(), local
    # What `make setup` needs, and every package.
    packages = {path.parent.name for path in CHECKOUT.glob("*/__init__.py")}
    packages -= {"tests", "bench"}
    assert {"Makefile", "pyproject.toml", "requirements", "LICENSE"} | packages <= set(
        mounts.values()
    )


@pytest.mark.parametrize("file", BOTH)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_start_replaces_this_clusters_processes_only(file: str, kind: str) -> None:
    stop, start = _load(file)[f"{kind}_start_ray_commands"]
    assert "serve_app.launch.cluster_node stop" in stop
    assert "serve_app.launch.cluster_node start" in start
    assert "RAY_AUTH_MODE" in start
    # As `baton up` does: Serve's proxy may run on any machine.
    (checks,) = re.findall(r"export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=(\S+)$", start, re.M)
    assert call_function_from_import_path(checks) != []
    # `ray stop` ends every Ray process of the machine, whomever it belongs to.
    assert "ray stop" not in stop + start
    # The supervisor waits for `ray start` to return.
    assert "--block" not in start
    assert ("--etcd" in start) == (kind == "head")
    # Ray warns, and starts no workers, if this is missing.
    assert ("ray start --head" in start) == (kind == "head")
    assert ("--autoscaling-config" in start) == (kind == "head")


def test_every_on_premises_worker_has_one_role() -> None:
    config = _load(ON_PREMISES)
    provider = config["provider"]
    start = config["worker_start_ray_commands"][1]
    rows = re.findall(r"^\s*([\d. |]+)\) resources='\{\"(\w+)\": \d+\}'", start, re.MULTILINE)
    roles = {
        address.strip(): resource
        for addresses, resource in rows
        for address in addresses.split("|")
    }
    assert set(roles) == set(provider["worker_ips"])
    assert set(roles.values()) == SIDES
    assert f"head={provider['head_ip']}" in config["head_start_ray_commands"][1]


def test_both_roles_use_the_same_ports() -> None:
    config = _load(ON_PREMISES)
    commands = [config[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker")]
    ports = [re.findall(r"\$\{BATON_RAY_PORTS:-(.*)\}", command) for command in commands]
    assert len(ports[0]) == 1
    assert ports[0] == ports[1]
    assert all("${BATON_GCS_PORT:-6379}" in command for command in commands)


def test_aws_pins_each_side_to_a_node_type_with_gpus() -> None:
    config = _prepared(AWS)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["max_workers"] == 0
    assert not SIDES & set(head["resources"])
    pinned = {}
    for name, node_type in types.items():
        (resource,) = SIDES & set(node_type["resources"])
        pinned[resource] = name
        assert node_type["resources"]["GPU"] == node_type["resources"][resource]
        assert node_type["min_workers"] >= 1
        assert any("[gpu]" in command for command in node_type["worker_setup_commands"])
    assert pinned == {"baton_prefill": "prefill", "baton_decode": "decode"}


@pytest.mark.parametrize("file", BOTH)
def test_its_header_tells_what_was_not_tried(file: str) -> None:
    header = (CHECKOUT / file).read_text().partition("cluster_name:")[0]
    assert re.search(r"not been tried|nobody has started it", header)
