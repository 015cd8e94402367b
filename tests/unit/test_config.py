from __future__ import annotations

import copy
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import (
    IMPORT_PATH,
    Settings,
    SettingsError,
    load_document,
    load_settings,
    parse_settings,
)
from transfer.settings import TransferSettings

GOOD: dict[str, Any] = {
    "model": {"id": "demo", "source": "baton-demo"},
    "engine": {"dtype": "bfloat16", "block_size": 32},
    "prefill": {"replicas": 2, "engine": {"max_num_seqs": 4}, "env": {"A": "1"}},
    "decode": {"autoscaling": {"min_replicas": 1, "max_replicas": 3}},
    "transfer": {"streams_per_peer": 4, "ticket_ttl_s": 10},
    "discovery": {"kind": "etcd", "endpoints": ["127.0.0.1:2379"], "cluster": "demo"},
    "router": {"api_keys": ["${BATON_KEY}", "file:/run/secrets/key"], "attempts": 2},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """``GOOD`` with one key set; ``None`` removes it."""
    args = copy.deepcopy(GOOD)
    *sections, last = path.split(".")
    place = args
    for section in sections:
        place = place.setdefault(section, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return args


def faults(args: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse_settings(args)
    return str(caught.value).splitlines()


def fault(args: Any) -> str:
    (line,) = faults(args)
    return line


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


# ---- contradictions ------------------------------------------------------------------------------


def test_replicas_and_autoscaling_exclude_each_other() -> None:
    assert fault(changed("decode.replicas", 2)) == (
        "decode: set either replicas or autoscaling, not both"
    )


def test_autoscaling_range_must_not_be_empty() -> None:
    line = fault(changed("decode.autoscaling.min_replicas", 4))

    assert line == "decode.autoscaling: min_replicas (4) is above max_replicas (3)"


def test_sides_may_differ_in_tensor_parallel_size() -> None:
    settings = parse_settings(changed("prefill.tensor_parallel_size", 2))

    assert settings.prefill.tensor_parallel_size == 2
    assert settings.decode.tensor_parallel_size == 1


def test_sides_may_differ_in_block_size_if_one_is_a_multiple_of_the_other() -> None:
    args = changed("prefill.engine.block_size", 64)
    args["decode"]["engine"] = {"block_size": 32}
    assert isinstance(parse_settings(args), Settings)

    args["decode"]["engine"] = {"block_size": 48}
    assert fault(args) == (
        "args: block_size is 64 for prefill and 48 for decode; one must be a multiple of the other"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("dtype", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "quantization", "max_model_len"),
        *("revision", "hf_overrides", "hf_config_path"),
    ],
)
def test_sides_must_not_differ_in_what_blocks_mean(name: str) -> None:
    line = fault(changed(f"prefill.engine.{name}", "other"))

    assert line.startswith(f"args: {name} is other for prefill and ")

    both = changed(f"prefill.engine.{name}", "other")
    both["decode"]["engine"] = {name: "other"}
    assert isinstance(parse_settings(both), Settings)


def test_attention_backends_must_not_differ_where_both_are_named() -> None:
    assert isinstance(parse_settings(changed("prefill.engine.attention_backend", "A")), Settings)
    both = changed("prefill.engine.attention_backend", "A")
    both["decode"]["engine"] = {"attention_backend": "B"}

    assert fault(both).startswith("args: attention_backend is A for prefill and B for decode")


@pytest.mark.parametrize(
    "config", [{"method": "eagle", "model": "x"}, {"model": "x"}, {"method": "mtp"}]
)
def test_speculation_with_layers_of_its_own_must_be_on_both_sides(config: dict[str, Any]) -> None:
    line = fault(changed("decode.engine.speculative_config", config))

    assert line.startswith("args: speculative_config has no layers for prefill and ")
    both = changed("decode.engine.speculative_config", config)
    both["prefill"]["engine"] = {"speculative_config": config}
    assert isinstance(parse_settings(both), Settings)


def test_speculation_from_the_text_may_be_on_one_side() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3}

    assert isinstance(parse_settings(changed("decode.engine.speculative_config", config)), Settings)


def test_prompts_are_kept_apart_by_keys_only_if_there_are_keys() -> None:
    assert parse_settings(GOOD).router.cache_salt_by_key is False
    args = changed("router.cache_salt_by_key", True)
    assert parse_settings(args).router.cache_salt_by_key is True
    args["router"]["api_keys"] = []
    assert fault(args) == ("router: cache_salt_by_key is set, but there are no api_keys to go by")


@pytest.mark.parametrize("section", ["engine", "prefill.engine", "decode.engine"])
def test_answers_of_all_keys_are_not_drafted_from_when_keys_are_kept_apart(section: str) -> None:
    config: dict[str, Any] = {"method": "suffix"}
    args = changed(f"{section}.speculative_config", config)
    assert isinstance(parse_settings(args), Settings)

    args["router"]["cache_salt_by_key"] = True
    assert "set suffix_decoding_max_cached_requests to 0" in fault(args)
    config["suffix_decoding_max_cached_requests"] = 0
    assert isinstance(parse_settings(args), Settings)


def test_side_may_repeat_what_both_have() -> None:
    settings = parse_settings(changed("prefill.engine.dtype", "bfloat16"))

    assert settings.prefill.engine["dtype"] == "bfloat16"


def test_gpu_type_without_gpus_is_refused() -> None:
    line = fault(changed("decode.resources", {"accelerator_type": "H100"}))

    assert line.startswith("decode.resources: accelerator_type is H100, but gpus_per_worker is 0")


@pytest.mark.parametrize("name", ["CPU", "GPU"])
def test_standard_resources_are_not_custom_ones(name: str) -> None:
    line = fault(changed("decode.resources", {"custom": {name: 1}}))

    assert line.startswith(f"decode.resources.custom: {name} is not a custom resource")


def test_worker_must_reserve_something() -> None:
    line = fault(changed("decode.resources", {"cpus_per_worker": 0}))

    assert line.startswith("decode.resources: set cpus_per_worker or gpus_per_worker")


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
