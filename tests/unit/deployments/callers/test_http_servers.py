"""Which vLLM server the proxy asks, what it asks a prefill server, and how its options are read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from deployments.callers.http_body import JsonBody
from deployments.callers.http_servers import HttpServers
from serve_app import cli
from serve_app.proxy import command
from serve_app.proxy.command import discovery_config, server_urls
from serve_app.proxy.endpoint import HEAD_TIMEOUT_S, Proxy, ProxyOptions
from tests.support.scripted.records import worker_record
from transfer.discovery.static import StaticDiscovery
from transfer.errors import ConfigurationError
from transfer.settings import TransferSettings
from transfer.types import WorkerRecord

A, B = "http://a:8100", "http://b:8100"
TLS = ("--tls-ca", "ca.pem", "--tls-cert", "own.pem", "--tls-key", "own.key")


def record(name: str, role: str, url: str, rank: int = 0) -> WorkerRecord:
    return replace(worker_record(name, rank, role=role), http_url=url)


def test_the_server_with_the_fewest_calls_is_picked() -> None:
    servers = HttpServers({"prefill": (A, B), "decode": (A,)}, None)
    with servers.calling(A):
        assert {servers.pick("prefill", ()) for _ in range(20)} == {B}
        with servers.calling(B), servers.calling(B):
            assert {servers.pick("prefill", ()) for _ in range(20)} == {A}
    picked = Counter(servers.pick("prefill", ()) for _ in range(200))
    assert set(picked) == {A, B}


def test_excluded_servers_are_not_picked() -> None:
    servers = HttpServers({"prefill": (A, B), "decode": ()}, None)

    assert {servers.pick("prefill", {A}) for _ in range(20)} == {B}
    assert servers.pick("prefill", {A, B}) is None
    assert servers.pick("decode", ()) is None


def test_servers_are_found_by_role_once_for_all_ranks() -> None:
    records = [
        record("p", "kv_producer", A),
        record("p", "kv_producer", A, rank=1),
        record("d", "kv_consumer", B),
        record("both", "kv_both", "http://c:1"),
        record("ray", "kv_producer", ""),
        record("else", "bench", "http://x:1"),
    ]
    with StaticDiscovery(records) as discovery:
        servers = HttpServers({"prefill": (), "decode": ()}, discovery)
        assert servers.urls("prefill") == [A, "http://c:1"]
        assert servers.urls("decode") == [B, "http://c:1"]
        named = HttpServers({"prefill": ("http://n:1",), "decode": ()}, discovery)
        assert named.urls("prefill") == ["http://n:1"]
        assert named.urls("decode") == [B, "http://c:1"]


def test_a_body_is_read_like_a_model() -> None:
    body = JsonBody({"prompt": "x", "stop": None, "echo": True, "logprobs": 0}, {"A": "b"})

    assert body.prompt == "x"
    with pytest.raises(AttributeError, match="messages"):
        _ = body.messages
    changed = body.model_copy(update={"kv_transfer_params": {"a": 1}})
    assert changed.fields == {**body.fields, "kv_transfer_params": {"a": 1}}
    assert changed.model_copy(update={"kv_transfer_params": None}) == body


# ---- the command line ----------------------------------------------------------------------------


def test_urls_may_be_short() -> None:
    given = ["10.0.0.1:8100", "http://10.0.0.2:8100/", "https://c", "10.0.0.1:8100"]

    assert server_urls("prefill", given) == (
        "http://10.0.0.1:8100",
        "http://10.0.0.2:8100",
        "https://c",
    )
    with pytest.raises(ConfigurationError, match=r"--decode 'ftp://a' is not a URL like"):
        server_urls("decode", ["ftp://a"])


def test_etcd_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.json"
    document = {"local_url": "a:1", "remote_url": "b:1", "metadata_server": "c:2379"}
    path.write_text(json.dumps(document))
    environment = {"MOONCAKE_CONFIG_PATH": str(path)}

    def config(*endpoints: str) -> dict[str, Any]:
        return {"kind": "etcd", "endpoints": list(endpoints), "cluster": "blue"}

    assert discovery_config("x:1,y:2", "blue", environment) == config("x:1", "y:2")
    assert discovery_config(None, "blue", environment) == config("c:2379")
    assert discovery_config(None, "blue", {}) is None
    path.write_text(json.dumps({**document, "metadata_server": "P2PHANDSHAKE"}))
    assert discovery_config(None, "blue", environment) is None


def test_the_command_gives_heads_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)
    monkeypatch.setattr(web, "run_app", lambda app, **options: served.update(options))

    assert cli.main(["proxy", "--prefill", A, "--decode", B]) == 0
    assert served["keepalive_timeout"] == HEAD_TIMEOUT_S


def test_the_command_hands_certificates_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ProxyOptions] = []

    def proxy(options: ProxyOptions) -> Proxy:
        made.append(options)
        return Proxy(replace(options, transfer=TransferSettings()))  # there are no such files

    monkeypatch.setattr(command, "make_discovery", lambda _: StaticDiscovery([]))
    monkeypatch.setattr(command, "Proxy", proxy)
    monkeypatch.setattr(web, "run_app", lambda app, **options: None)

    assert cli.main(["proxy", "--etcd", "a:1", *TLS, "--tls-server-name", "gpu"]) == 0
    given = made[0].transfer
    assert (given.tls_ca, given.tls_cert, given.tls_key) == ("ca.pem", "own.pem", "own.key")
    assert given.tls_server_name == "gpu"


def test_files_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "make_discovery", lambda _: StaticDiscovery([]))

    assert cli.main(["proxy", "--etcd", "a:1", *TLS]) == 1
    assert "ca.pem" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--prefill is missing, and so is etcd"),
        (["--prefill", A], "--decode is missing, and so is etcd"),
        (["--prefill", A, "--decode", "b:c"], "--decode 'b:c' is not a URL"),
        (["--allowed-origin", "a.com/x"], "--allowed-origin 'a.com/x' is not an origin as"),
        (["--etcd", "nowhere"], "etcd endpoint 'nowhere' is not host:port"),
        (["--tls-ca", "a.pem"], "tls_cert is '', must be set too"),
        (["--tls-server-name", "a"], "tls_server_name is 'a', must be empty without tls_ca"),
        (
            ["--prefill", A, "--decode", B, *TLS],
            "--tls-ca is for telling owners of blocks, whom only etcd knows: name --etcd",
        ),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)

    assert cli.main(["proxy", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"baton: {said}")
