"""config.yaml and the examples: the application is built from each, and nothing is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve.deployment import Application, Deployment

from deployments.replicas.decode import DecodeServer
from deployments.replicas.prefill import PrefillServer
from serve_app import app
from serve_app.config import SettingsError, parse_settings
from serve_app.config_file import load_document

CHECKOUT = Path(__file__).resolve().parents[3]
DEMO = "config.yaml"
SMALL = "examples/qwen2.5-7b-1p1d.yaml"
TENSOR_PARALLEL = "examples/llama-3.3-70b-tp4.yaml"
LARGE = "examples/qwen2.5-7b-3p2d.yaml"
ALL = (DEMO, SMALL, TENSOR_PARALLEL, LARGE)

# Any test here may be the first to import vLLM.
pytestmark = pytest.mark.timeout(90)


class Built:
    """The application that one file describes."""

    def __init__(self, file: str) -> None:
        document = load_document(CHECKOUT / file)
        (self.application,) = document["applications"]
        self.settings = parse_settings(self.application["args"])
        self.ingress = _deployment(app.build_app(self.application["args"]))
        self.sides = {
            role: _deployment(self.ingress.init_kwargs[role]) for role in ("prefill", "decode")
        }

    def llm_config(self, role: str) -> Any:
        """Ray's LLMConfig of one side."""
        return self.sides[role].init_kwargs["llm_config"]

    def kv_transfer(self, role: str) -> dict[str, Any]:
        """What one side's engine is told of its connector."""
        config: dict[str, Any] = self.llm_config(role).engine_kwargs["kv_transfer_config"]
        return config

    def bundles(self, role: str) -> list[dict[str, float]]:
        """What Ray reserves for a replica; the first bundle holds the replica itself, too."""
        bundles = self.sides[role]._replica_config.placement_group_bundles
        return [{name: n for name, n in bundle.items() if n} for bundle in bundles]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks for the driver's runtime environment, and would start a cluster to answer."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    # The demo model need not have been made.
    monkeypatch.setattr(app, "resolve_model", lambda source: source)


def test_every_example_is_tested_here() -> None:
    applications = {
        f"examples/{path.name}"
        for path in (CHECKOUT / "examples").glob("*.yaml")
        if not path.name.startswith("cluster-")
    }
    assert applications == set(ALL) - {DEMO}


@pytest.mark.parametrize("file", ALL)
def test_builds_both_sides_of_one_model(file: str) -> None:
    built = Built(file)
    assert not ray.is_initialized()

    model = built.settings.model
    name = model.id.replace("/", "--").replace(".", "_")
    assert built.ingress.name == "Ingress"
    assert {role: side.name for role, side in built.sides.items()} == {
        "prefill": f"Prefill:{name}",
        "decode": f"Decode:{name}",
    }
    assert built.sides["prefill"].func_or_class is PrefillServer
    assert built.sides["decode"].func_or_class is DecodeServer
    for role in ("prefill", "decode"):
        loading = built.llm_config(role).model_loading_config
        assert (loading.model_id, loading.model_source) == (model.id, model.source)
    assert [card.id for card in built.ingress.init_kwargs["model_cards"]] == [model.id]


@pytest.mark.parametrize("file", ALL)
def test_both_sides_find_each_other_and_agree_on_blocks(file: str) -> None:
    built = Built(file)
    sides = {role: built.kv_transfer(role) for role in ("prefill", "decode")}
    assert sides["prefill"]["kv_role"] == "kv_producer"
    assert sides["decode"]["kv_role"] == "kv_consumer"
    for config in sides.values():
        assert config["kv_connector"] == "BatonConnector"
        assert config["kv_connector_module_path"] == "transfer.connector"
        extra = config["kv_connector_extra_config"]
        assert extra["discovery"] == built.application["args"]["discovery"]
        assert extra["discovery"]["kind"] == "etcd"
    extras = [config["kv_connector_extra_config"] for config in sides.values()]
    assert extras[0] == extras[1]

    kwargs = [built.llm_config(role).engine_kwargs for role in ("prefill", "decode")]
    for key in ("dtype", "block_size", "max_model_len", "tensor_parallel_size"):
        assert kwargs[0][key] == kwargs[1][key]


@pytest.mark.parametrize("file", ALL)
def test_engine_arguments_exist(file: str) -> None:
    """Ray refuses names that vLLM does not know, and values of the accelerator it does not."""
    built = Built(file)
    for role in ("prefill", "decode"):
        built.llm_config(role).get_engine_config()


def test_the_demo_needs_no_gpu() -> None:
    built = Built(DEMO)
    for role in ("prefill", "decode"):
        assert built.llm_config(role).accelerator_config.kind == "cpu"
        assert built.bundles(role) == [{"CPU": pytest.approx(1.1)}]
        assert built.sides[role].num_replicas == 1


def test_one_prefill_and_one_decode_gpu() -> None:
    built = Built(SMALL)
    for role in ("prefill", "decode"):
        assert built.llm_config(role).accelerator_config.kind == "gpu"
        assert built.bundles(role) == [{"CPU": pytest.approx(1.1), "GPU": 1}]
        assert built.sides[role].num_replicas == 1


def test_tensor_parallelism_of_four_on_both_sides() -> None:
    built = Built(TENSOR_PARALLEL)
    for role in ("prefill", "decode"):
        bundles = built.bundles(role)
        assert len(bundles) == built.llm_config(role).engine_kwargs["tensor_parallel_size"] == 4
        assert all(bundle["GPU"] == 1 for bundle in bundles)
        assert all("accelerator_type:H100" in bundle for bundle in bundles)
        assert built.sides[role]._replica_config.placement_group_strategy == "STRICT_PACK"


def test_several_replicas_pinned_to_their_machines() -> None:
    built = Built(LARGE)
    assert built.sides["prefill"].num_replicas == 3
    autoscaling = built.sides["decode"]._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (2, 4)
    assert built.ingress.num_replicas == 2
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        for bundle in built.bundles(role):
            assert bundle[f"baton_{role}"] == 1
            assert f"baton_{other}" not in bundle


def _deployment(application: Application) -> Deployment:
    return application._bound_deployment


@pytest.mark.parametrize("section", ["engine", "prefill", "decode"])
def test_an_unknown_engine_argument_is_named_with_its_section(section: str) -> None:
    args: dict[str, Any] = {
        "model": {"id": "m", "source": "m"},
        "discovery": {"kind": "static"},
        "engine": {},
        "prefill": {},
        "decode": {},
    }
    if section == "engine":
        args["engine"] = {"max_model_length": 1}
    else:
        args[section] = {"engine": {"max_model_length": 1}}
    path = section if section == "engine" else f"{section}.engine"
    with pytest.raises(SettingsError, match=rf"^{path}\.max_model_length: .*max_model_len"):
        app.build_app(args)
