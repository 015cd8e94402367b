"""``mooncake.json``: what each file means for a worker, and how each fault is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transfer.addressing import Address
from transfer.discovery import check_discovery, make_discovery
from transfer.errors import ConfigurationError
from transfer.mooncake.config import (
    End,
    MooncakeSettings,
    cluster_settings,
    own_end,
    parse_mooncake,
    worker_settings,
)
from transfer.mooncake.file import is_own_address, mooncake_from, read_mooncake
from transfer.settings import TransferSettings
from transfer.types import PeerId

PREFILL, DECODE, ETCD = "10.0.0.1:13003", "10.0.0.2:13103", "10.0.0.2:2379"
TCP: dict[str, Any] = {
    "local_url": PREFILL,
    "remote_url": DECODE,
    "metadata_server": ETCD,
    "protocol": "tcp",
    "device_name": "",
}
RDMA = {**TCP, "protocol": "rdma", "device_name": "mlx5_0"}
OLD = {
    **{name: TCP[name] for name in ("metadata_server", "protocol", "device_name")},
    "prefill_url": PREFILL,
    "decode_url": DECODE,
}
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "mooncake"

AT_ETCD: dict[str, Any] = {"kind": "etcd", "endpoints": [ETCD]}
BY_TCP: dict[str, Any] = {"transports": ["tcp"]}
AT_PREFILL = {"host": "10.0.0.1", "port": 13003}
AT_DECODE = {"host": "10.0.0.2", "port": 13103}


def told(document: Any, end: End | None = "local", rank: int = 0) -> MooncakeSettings:
    settings = worker_settings(parse_mooncake(document, "mooncake.json"), end, rank)
    # Whatever a file says, the rest of Baton takes it.
    check_discovery(settings.discovery)
    TransferSettings(**settings.transfer)
    return settings


@pytest.mark.parametrize(
    ("document", "end", "rank", "discovery", "transfer"),
    [
        (TCP, "local", 0, AT_ETCD, {**BY_TCP, **AT_PREFILL}),
        (TCP, "remote", 0, AT_ETCD, {**BY_TCP, **AT_DECODE}),
        (TCP, "remote", 3, AT_ETCD, {**BY_TCP, **AT_DECODE, "port": 13106}),
        (OLD, "local", 0, AT_ETCD, {**BY_TCP, **AT_PREFILL}),
        (OLD, "remote", 0, AT_ETCD, {**BY_TCP, **AT_DECODE}),
        (
            RDMA,
            "local",
            0,
            AT_ETCD,
            {"transports": ["rdma"], "rdma_device": "mlx5_0", **AT_PREFILL},
        ),
        (
            {**RDMA, "device_name": "mlx5_0, mlx5_1,"},
            "local",
            0,
            AT_ETCD,
            {"transports": ["rdma"], "rdma_device": "mlx5_0,mlx5_1", **AT_PREFILL},
        ),
        # A device beside tcp is of no use, but the demo's files may name one.
        ({**TCP, "device_name": "eth0"}, "local", 0, AT_ETCD, {**BY_TCP, **AT_PREFILL}),
        # What the demo itself took for granted.
        (
            {name: TCP[name] for name in ("local_url", "remote_url", "metadata_server")},
            "local",
            0,
            AT_ETCD,
            {**BY_TCP, **AT_PREFILL},
        ),
        (
            {**TCP, "remote_url": PREFILL},
            "remote",
            0,
            AT_ETCD,
            {**BY_TCP, **AT_PREFILL, "port": 13103},
        ),
        ({**TCP, "metadata_backend": "etcd"}, "local", 0, AT_ETCD, {**BY_TCP, **AT_PREFILL}),
        (
            {**TCP, "local_url": "[fd00::1]:13003"},
            "local",
            0,
            AT_ETCD,
            {**BY_TCP, "host": "fd00::1", "port": 13003},
        ),
    ],
)
def test_a_file_is_translated(
    document: Any, end: End, rank: int, discovery: Any, transfer: Any
) -> None:
    assert told(document, end, rank) == MooncakeSettings(discovery, transfer)


@pytest.mark.parametrize(
    ("server", "endpoints"),
    [
        ("10.0.0.2:2379", ["10.0.0.2:2379"]),
        (" etcd-0:2379 ", ["etcd-0:2379"]),
        ("etcd://10.0.0.2:2379", ["10.0.0.2:2379"]),
        ("http://10.0.0.2:2379", ["http://10.0.0.2:2379"]),
        ("https://10.0.0.2:2379/", ["https://10.0.0.2:2379"]),
        ("a:2379,b:2379, c:2379", ["a:2379", "b:2379", "c:2379"]),
        ("etcd://a:2379,b:2379,", ["a:2379", "b:2379"]),
    ],
)
def test_metadata_server_names_etcd(server: str, endpoints: list[str]) -> None:
    settings = told({**TCP, "metadata_server": server})

    assert settings.discovery == {"kind": "etcd", "endpoints": endpoints}


def test_p2p_handshake_is_static_discovery_of_the_other_node() -> None:
    document = {**TCP, "metadata_server": "P2PHANDSHAKE"}

    with make_discovery(told(document, "remote").discovery) as discovery:
        for rank in (0, 3):
            record = discovery.wait_for(PeerId("an id of its own making", rank), 0.0)
            assert record.addresses == (f"tcp://10.0.0.1:{13003 + rank}",)
            assert record.incarnation == record.layout_hash == ""
    with make_discovery(told(document, "local").discovery) as discovery:
        found = discovery.lookup(PeerId("whoever", 0))
        assert found is not None
        assert found.addresses == ("tcp://10.0.0.2:13103",)


@pytest.mark.parametrize(
    ("own_hosts", "role", "end"),
    [
        # The same file on both nodes, as in the demo.
        (["10.0.0.1"], "", "local"),
        (["10.0.0.2"], "", "remote"),
        # A file for each node that names itself first: the machine knows better than the role.
        (["10.0.0.1"], "consumer", "local"),
        (["10.0.0.2"], "producer", "remote"),
        # Both servers on one machine, or behind a translated address.
        (["10.0.0.1", "10.0.0.2"], "producer", "local"),
        (["10.0.0.1", "10.0.0.2"], "consumer", "remote"),
        ([], "producer", "local"),
        ([], "consumer", "remote"),
        ([], "", None),
        (["10.0.0.1", "10.0.0.2"], "", None),
    ],
)
def test_which_url_is_ours(own_hosts: list[str], role: str, end: End | None) -> None:
    assert own_end(parse_mooncake(TCP, "m.json"), role, own_hosts.__contains__) == end


def test_two_servers_on_one_host_need_no_role_with_etcd() -> None:
    settings = told({**TCP, "remote_url": "10.0.0.1:13103"}, None)

    assert settings.transfer == {**BY_TCP, "host": "10.0.0.1", "port": 0}


@pytest.mark.parametrize(
    "document",
    [TCP, {**TCP, "remote_url": "10.0.0.1:13103", "metadata_server": "P2PHANDSHAKE"}],
    ids=["two hosts", "static discovery"],
)
def test_not_knowing_who_we_are_is_refused_where_it_matters(document: Any) -> None:
    with pytest.raises(ConfigurationError, match="set VLLM_DISTRIBUTED_KV_ROLE to producer or"):
        told(document, None)


def test_in_a_cluster_workers_listen_where_they_are_placed() -> None:
    settings = cluster_settings(parse_mooncake(RDMA, "m.json"))

    assert settings.discovery == AT_ETCD
    assert settings.transfer == {"transports": ["rdma"], "rdma_device": "mlx5_0"}
    with pytest.raises(ConfigurationError, match=r"m\.json: metadata_server: is P2PHANDSHAKE"):
        cluster_settings(parse_mooncake({**TCP, "metadata_server": "P2PHANDSHAKE"}, "m.json"))


# ---- faults --------------------------------------------------------------------------------------


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in TCP.items() if name not in names}


@pytest.mark.parametrize(
    ("document", "lines"),
    [
        ([], ["m.json: is not a JSON object"]),
        ("tcp", ["m.json: is not a JSON object"]),
        (
            without("local_url"),
            ["m.json: local_url: is missing (it may also be called prefill_url"],
        ),
        (
            without("remote_url"),
            ["m.json: remote_url: is missing (it may also be called decode_url"],
        ),
        (without("metadata_server"), ["m.json: metadata_server: is missing; it must be host:port"]),
        ({**TCP, "metadata_server": ""}, ["m.json: metadata_server: is missing"]),
        ({**TCP, "metadata_server": 2379}, ["m.json: metadata_server: is 2379, must be text"]),
        ({**TCP, "metadata_server": "etcd"}, ["m.json: metadata_server: etcd endpoint 'etcd' is"]),
        (
            {**TCP, "metadata_server": "redis://h:6379"},
            ["m.json: metadata_server: etcd endpoint 'redis://h:6379' has scheme 'redis'"],
        ),
        (
            {**TCP, "metadata_server": "http://h:8080/metadata"},
            ["m.json: metadata_server: etcd endpoint 'http://h:8080/metadata' is not"],
        ),
        ({**TCP, "metadata_server": "h:99999"}, ["m.json: metadata_server: etcd endpoint"]),
        ({**TCP, "metadata_backend": "redis"}, ["m.json: metadata_backend: is 'redis'; only etcd"]),
        ({**TCP, "protocol": "nvlink"}, ["m.json: protocol: is 'nvlink', must be tcp or rdma"]),
        ({**TCP, "protocol": True}, ["m.json: protocol: is True, must be text"]),
        ({**RDMA, "device_name": ""}, ["m.json: device_name: is missing; protocol rdma needs"]),
        ({**RDMA, "device_name": " , "}, ["m.json: device_name: is missing; protocol rdma needs"]),
        ({**RDMA, "device_name": ["mlx5_0"]}, ["m.json: device_name: is ['mlx5_0'], must be text"]),
        ({**TCP, "local_url": "10.0.0.1"}, ["m.json: local_url: is '10.0.0.1', must be host:port"]),
        ({**TCP, "local_url": "10.0.0.1:0"}, ["m.json: local_url: is '10.0.0.1:0', must be host"]),
        ({**TCP, "local_url": "http://a:1"}, ["m.json: local_url: is 'http://a:1', must be host"]),
        ({**TCP, "remote_url": 13003}, ["m.json: remote_url: is 13003, must be text"]),
        ({**TCP, "remote_url": "0.0.0.0:13003"}, ["m.json: remote_url: is 0.0.0.0:13003, which"]),
        ({**OLD, "decode_url": "x"}, ["m.json: decode_url: is 'x', must be host:port"]),
        (
            {**TCP, "prefill_url": PREFILL},
            ["m.json: prefill_url: means the same as local_url; give one of them"],
        ),
        ({**TCP, "metadata_sever": "a:1"}, ["m.json: metadata_sever: is unknown; known are"]),
        (
            {"protocol": "rdma", "metadata_server": "x", "local_url": "y"},
            [
                "m.json: local_url: is 'y', must be host:port",
                "m.json: remote_url: is missing",
                "m.json: metadata_server: etcd endpoint 'x'",
                "m.json: device_name: is missing",
            ],
        ),
    ],
)
def test_each_fault_is_one_line_that_names_file_and_field(document: Any, lines: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_mooncake(document, "m.json")
    found = caught.value.message.splitlines()
    assert len(found) == len(lines), found
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rdma", "tcp"])
def test_examples_can_be_used(name: str) -> None:
    config = read_mooncake(EXAMPLES / f"{name}.json")

    assert config.protocol == name
    assert config.local == Address("tcp", "192.168.0.137", 13003)
    assert bool(config.device_name) == (name == "rdma")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.json"
    with pytest.raises(ConfigurationError, match=r"mooncake\.json: cannot be read: No such file"):
        read_mooncake(path)
    for content in (b"{'local_url': 1}", b"\xff", b""):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"mooncake\.json: is not JSON"):
            read_mooncake(path)


def test_the_environment_names_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.json"
    path.write_text(json.dumps(TCP))

    assert mooncake_from({"MOONCAKE_CONFIG_PATH": str(path)}) == read_mooncake(path)
    assert mooncake_from({"MOONCAKE_CONFIG_PATH": ""}) is None
    assert mooncake_from({}) is None


def test_names_that_do_not_exist_are_not_ours() -> None:
    assert not is_own_address("no-such-host.invalid")
