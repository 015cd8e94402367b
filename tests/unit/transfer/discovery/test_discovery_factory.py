from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from transfer.discovery import make_discovery
from transfer.discovery.settings import Endpoint, EtcdSettings, parse_endpoints
from transfer.discovery.static import StaticDiscovery
from transfer.errors import ConfigurationError
from transfer.types import PeerId

PEER = {"engine_id": "p0", "addresses": ["tcp://10.0.0.1:7000"], "role": "prefill"}


def test_static_peers_leave_open_what_only_the_handshake_knows() -> None:
    with make_discovery({"kind": "static", "peers": [PEER]}) as discovery:
        assert isinstance(discovery, StaticDiscovery)
        record = discovery.lookup(PeerId("p0", 0))
    assert record is not None
    assert (record.incarnation, record.layout_hash) == ("", "")
    assert (record.tp_size, record.addresses) == (1, ("tcp://10.0.0.1:7000",))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "kind is None; use one of: etcd, static"),
        ({"kind": "zookeeper"}, "'zookeeper'; use one of: etcd, static"),
        ({"kind": "etcd", "endpoint": "h:1"}, "no key 'endpoint'; did you mean 'endpoints'"),
        ({"kind": "etcd", "peers": []}, "no key 'peers'; known keys: endpoints"),
        ({"kind": "etcd"}, "no etcd endpoints given"),
        ({"kind": "etcd", "endpoints": []}, "no etcd endpoints given"),
        ({"kind": "etcd", "endpoints": 2379}, "endpoints is not a list"),
        ({"kind": "etcd", "endpoints": ["h:1"], "cluster": 5}, "cluster of discovery is not"),
        ({"kind": "etcd", "endpoints": ["h:1"], "cluster": "a/b"}, "cluster 'a/b'"),
        ({"kind": "etcd", "endpoints": ["h:1"], "lease_ttl_s": 0}, "from 2 to 600"),
        ({"kind": "etcd", "endpoints": ["h:1"], "lease_ttl_s": 5.5}, "whole seconds"),
        ({"kind": "etcd", "endpoints": ["h:1"], "user": "u"}, "user and password together"),
        ({"kind": "etcd", "endpoints": ["h:1"], "tls_ca": "/no/such"}, "tls_ca '/no/such'"),
        ({"kind": "static", "endpoints": []}, "no key 'endpoints'; known keys: peers"),
        ({"kind": "static", "peers": {}}, "peers of static discovery is not a list"),
        ({"kind": "static", "peers": ["p0"]}, "peer 0 .* is not a mapping"),
        ({"kind": "static", "peers": [{**PEER, "port": 1}]}, "peer 0 .* no key 'port'"),
        ({"kind": "static", "peers": [{"engine_id": "p0"}]}, "peer 0 .* has no addresses"),
        ({"kind": "static", "peers": [{**PEER, "rank": "0"}]}, "rank is not an integer"),
        ({"kind": "static", "peers": [{**PEER, "addresses": "tcp://h:1"}]}, "not a list"),
        ({"kind": "static", "peers": [PEER, PEER]}, "listed twice"),
    ],
)
def test_a_wrong_configuration_says_what_would_be_right(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_discovery(config)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("127.0.0.1:2379", [Endpoint("127.0.0.1", 2379)]),
        (" a:1 , https://b.example:2,", [Endpoint("a", 1), Endpoint("b.example", 2, "https")]),
        (
            ["HTTP://etcd-0:2379/", "[::1]:9"],
            [Endpoint("etcd-0", 2379, "http"), Endpoint("[::1]", 9)],
        ),
        (["a:1", "a:1"], [Endpoint("a", 1)]),
    ],
)
def test_endpoints_are_taken_apart(value: str | list[str], expected: list[Endpoint]) -> None:
    assert parse_endpoints(value) == tuple(expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "no etcd endpoints"),
        (" , ", "no etcd endpoints"),
        ("localhost", "'localhost' is not host:port"),
        ("a:0", "port 0"),
        ("a:65536", "port 65536"),
        ("a:1:2", "not host:port"),
        ("grpc://a:1", "scheme 'grpc'; use http or https"),
        ("a:1/path", "not host:port"),
        ([2379], "2379 is not a string"),
    ],
)
def test_a_bad_endpoint_is_named(value: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse_endpoints(value)


def test_tls_files_and_plain_http_exclude_each_other(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch()
    with pytest.raises(ConfigurationError, match="plain http"):
        EtcdSettings("http://h:1", tls_ca=str(authority))
    with pytest.raises(ConfigurationError, match="tls_cert and tls_key"):
        EtcdSettings("h:1", tls_cert=str(authority))


def test_user_and_password_are_read_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("ETCD_TEST_USER", "me")
    settings = EtcdSettings("h:1", user="${ETCD_TEST_USER}", password=f"file:{file}")
    for password in ("hush", "another"):
        file.write_text(password + "\n")
        assert settings.credentials() == ("me", password)
    assert EtcdSettings("h:1", user="u", password=f"file:{file}").credentials()[0] == "u"
    assert EtcdSettings("h:1").credentials() == ("", "")


def test_a_password_that_is_not_there_is_named_before_any_connection() -> None:
    config = {"kind": "etcd", "endpoints": ["h:1"], "user": "u", "password": "${NO_SUCH_PASSWORD}"}
    with pytest.raises(ConfigurationError, match=r"password of etcd: \$\{NO_SUCH_PASSWORD\}"):
        make_discovery(config)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyetcd.etcdrpc", None)
    with pytest.raises(ConfigurationError, match="package etcd-sdk-python"):
        make_discovery({"kind": "etcd", "endpoints": ["127.0.0.1:2379"]})
