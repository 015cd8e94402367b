"""Settings one by one: what is accepted, and how wrong ones are named."""

from __future__ import annotations

import copy
import traceback
from typing import Any

import pytest

from serve_app.config import SettingsError, parse_settings
from tests.support.servers.app_settings import GOOD, changed, fault, faults
from transfer.settings import TransferSettings

# ---- what is accepted ----------------------------------------------------------------------------


def test_settings_are_read() -> None:
    settings = parse_settings(GOOD)

    assert settings.model.id == "demo"
    assert settings.side("prefill").replicas == 2
    assert settings.side("prefill").engine == {"max_num_seqs": 4}
    assert settings.side("decode").autoscaling is not None
    assert settings.side("decode") is settings.decode
    assert settings.transfer == {"streams_per_peer": 4, "ticket_ttl_s": 10}
    assert settings.router.attempts == 2
    assert settings.discovery["cluster"] == "demo"


def test_model_and_discovery_are_enough() -> None:
    settings = parse_settings({name: GOOD[name] for name in ("model", "discovery")})

    assert settings.prefill == settings.decode
    assert settings.prefill.replicas == 1
    assert settings.router.api_keys == []
    assert settings.transfer == {}


def test_reading_settings_does_not_change_what_was_given() -> None:
    args = copy.deepcopy(GOOD)
    parse_settings(args)

    assert args == GOOD


# ---- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("modle_", "model, engine, prefill, decode, transfer, discovery, router"),
        ("model.name", "id, source"),
        ("prefill.replica", "replicas, autoscaling, tensor_parallel_size, engine, env"),
        ("decode.resources.gpus", "cpus_per_replica, cpus_per_worker, gpus_per_worker"),
        ("decode.autoscaling.max", "min_replicas, max_replicas, target_ongoing_requests"),
        ("router.retries", "replicas, cpus_per_replica, api_keys, cache_salt_by_key, max_body"),
    ],
)
def test_unknown_key_is_named_with_its_path_and_the_known_ones(path: str, known: str) -> None:
    line = fault(changed(path, 1))

    assert line.startswith(f"{path}: unknown key; known here are {known}")


def test_unknown_key_of_transfer_is_named_with_the_known_ones() -> None:
    line = fault(changed("transfer.stream_per_peer", 2))

    assert line.startswith("transfer: stream_per_peer is unknown; known are connect_timeout_s, ")
    assert "streams_per_peer" in line


def test_unknown_key_of_discovery_comes_with_a_guess() -> None:
    line = fault(changed("discovery.endpoint", "127.0.0.1:2379"))

    assert line.startswith("discovery: ")
    assert "'endpoint'" in line
    assert "did you mean 'endpoints'?" in line


def test_every_fault_gets_its_line() -> None:
    args = changed("router.retries", 1)
    args["prefill"]["replicas"] = 0
    args["model"]["id"] = ""
    del args["discovery"]

    assert sorted(line.split(":")[0] for line in faults(args)) == [
        "discovery",
        "model.id",
        "prefill.replicas",
        "router.retries",
    ]


# ---- wrong values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", None),
        ("model.id", None),
        ("model.id", ""),
        ("model.source", None),
        ("model.source", ""),
        ("engine", "fast"),
        ("prefill", 3),
        ("prefill.replicas", 0),
        ("prefill.replicas", 1.5),
        ("prefill.replicas", "many"),
        ("prefill.env", {"A": 1}),
        ("prefill.max_ongoing_requests", 0),
        ("prefill.drain_timeout_s", 0),
        ("decode.tensor_parallel_size", 0),
        ("decode.resources", {"cpus_per_worker": -1}),
        ("decode.resources", {"strategy": "TOGETHER"}),
        ("decode.resources", {"custom": {"slot": 0}}),
        ("router.attempts", 0),
        ("router.attempts", 11),
        ("router.api_keys", ["12345678"]),
        ("router.api_keys", ["${BATON_KEY}", "x${BATON_KEY}"]),
        ("router.api_keys", ["file:key"]),
        ("router.api_keys", [5]),
        ("router.api_keys", "${BATON_KEY}"),
        ("router.cache_salt_by_key", "by name"),
        ("router.max_body_bytes", 1023),
        ("router.max_bytes_in_flight", 0),
        ("router.body_timeout_s", 0),
        ("router.max_tokenize_length", 0),
        ("router.allowed_origins", "https://chat.example.com"),
        ("router.allowed_origins", ["chat.example.com"]),
        ("router.allowed_origins", ["https://chat.example.com/"]),
        ("router.backoff_s", -0.1),
        ("router.backoff_max_s", float("nan")),
        ("router.pick_timeout_s", 0),
        ("router.health_timeout_s", "soon"),
        ("discovery", None),
        ("discovery", "etcd"),
    ],
)
def test_wrong_value_is_named_by_its_path(path: str, value: Any) -> None:
    assert fault(changed(path, value)).startswith(path)


def test_the_longest_body_fits_into_what_may_be_in_flight() -> None:
    said = fault(changed("router.max_bytes_in_flight", 1 << 20))

    assert said.startswith("router: max_bytes_in_flight (1048576) is below max_body_bytes")


@pytest.mark.parametrize("args", [None, [], "settings", 3])
def test_args_must_be_a_mapping(args: Any) -> None:
    assert fault(args).startswith("args: ")


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "served_model_name",
        "tokenizer",
        "kv_transfer_config",
        "worker_extension_cls",
        "distributed_executor_backend",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_prompt_tokens_details",
        "api_key",
    ],
)
@pytest.mark.parametrize("section", ["engine", "prefill.engine", "decode.engine"])
def test_engine_arguments_that_baton_sets_are_refused(section: str, name: str) -> None:
    line = fault(changed(f"{section}.{name}", 1))

    assert line.startswith(f"{section}: {name} cannot be set here: ")


# ---- transfer and discovery are checked here, not when an engine starts --------------------------


WRONG_TRANSFER: list[tuple[str, Any]] = [
    ("host", ""),
    ("host", "a..b"),
    ("host", "a\0b"),
    ("host", "0.0.0.0"),
    ("host", "0"),
    ("host", "::"),
    ("host", "::ffff:0.0.0.0"),
    ("host", 5),
    ("port", -1),
    ("port", 65536),
    ("port", "7000"),
    ("port", True),
    ("port", 7000.0),
    ("digests", 1),
    ("host_staging_bytes", 0.5),
    ("streams_per_peer", 0),
    ("streams_per_peer", 2.5),
    ("slice_bytes", 4095),
    ("tcp_congestion", 1),
    ("tcp_congestion", "Cubic "),
    ("tcp_congestion", "longer_than_any_name"),
    ("max_inflight_bytes", "1 GiB"),
    ("ticket_ttl_s", 0),
    ("ticket_ttl_s", float("nan")),
    ("ticket_ttl_s", float("inf")),
    ("ticket_ttl_s", "30"),
    ("ticket_ttl_s", True),
    ("ticket_ttl_s", [30]),
    ("read_deadline_s", -1.0),
    ("connect_timeout_s", 86401),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TRANSFER)
def test_transfer_settings_are_checked(name: str, value: Any) -> None:
    assert fault(changed("transfer", {name: value})).startswith(f"transfer: {name}")


def test_transfer_settings_that_are_accepted_make_transfer_settings() -> None:
    transfer = parse_settings(GOOD).transfer

    assert TransferSettings(**transfer).streams_per_peer == 4
    assert TransferSettings(**transfer).ticket_ttl_s == 10


@pytest.mark.parametrize(
    ("discovery", "named"),
    [
        ({}, "kind"),
        ({"kind": "dns"}, "etcd, static"),
        ({"kind": "etcd"}, "endpoints"),
        ({"kind": "etcd", "endpoints": []}, "endpoints"),
        ({"kind": "etcd", "endpoints": ["nowhere"]}, "nowhere"),
        ({"kind": "etcd", "endpoints": ["127.0.0.1:2379"], "lease_ttl_s": 1}, "lease_ttl_s"),
        ({"kind": "etcd", "endpoints": ["127.0.0.1:2379"], "user": "me"}, "password"),
        ({"kind": "static", "peers": [{"engine_id": "a"}]}, "addresses"),
    ],
)
def test_discovery_is_checked(discovery: dict[str, Any], named: str) -> None:
    line = fault(changed("discovery", discovery))

    assert line.startswith("discovery: ")
    assert named in line


# ---- secrets -------------------------------------------------------------------------------------


SECRET = "a-secret-written-out"
WRITTEN_OUT = (
    "a secret is not written out here; write where it is: "
    "${NAME} for an environment variable, or file:/path"
)
TOKEN_WRITTEN_OUT = (
    "hf_token is not written out here: set HF_TOKEN in the environment of every machine"
)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "router.api_keys",
            [SECRET],
            f"router.api_keys.0: {WRITTEN_OUT}",
        ),
        (
            "discovery",
            {"kind": "etcd", "endpoints": ["h:1"], "user": "baton", "password": SECRET},
            f"discovery: password of etcd: {WRITTEN_OUT}",
        ),
        (
            "discovery",
            {"kind": "etcd", "endpoints": [f"http://baton:{SECRET}@h:1"]},
            "discovery: an etcd endpoint holds a user; set user and password beside endpoints",
        ),
        (
            "engine",
            {"hf_token": SECRET},
            f"engine: {TOKEN_WRITTEN_OUT}",
        ),
        ("router.api_keys", SECRET, "router.api_keys: Input should be a valid list"),
        ("router.api_keys", {SECRET: 1}, "router.api_keys: Input should be a valid list"),
    ],
)
def test_a_secret_that_is_written_out_is_refused_and_not_repeated(
    path: str, value: Any, line: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(changed(path, value))
    assert str(caught.value) == line
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("user", ["baton", "${ETCD_USER}", "file:/run/secrets/user"])
def test_secrets_by_reference_are_accepted_where_they_are_not(user: str) -> None:
    discovery = {"kind": "etcd", "endpoints": ["h:1"], "user": user, "password": "${NO_SUCH}"}
    assert parse_settings(changed("discovery", discovery)).discovery == discovery
    assert parse_settings(changed("engine", {"hf_token": True})).engine == {"hf_token": True}
