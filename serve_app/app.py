"""``serve run config.yaml`` starts here: settings in, Serve application out. The only wiring."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_llm_deployment
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs

from deployments.ray_internals.models import to_model_metadata
from deployments.replicas.decode import DecodeServer
from deployments.replicas.owner_breaker import BreakerPolicy
from deployments.replicas.prefill import PrefillServer
from deployments.replicas.replica_router import HintedRouter
from deployments.role import Role
from deployments.router.admission import AdmissionPolicy
from deployments.router.request_state import RetryPolicy
from serve_app.api_keys import ApiKeys
from serve_app.config import Settings, SettingsError, SideSettings, parse_settings
from serve_app.edge.body_limits import BodyLimits
from serve_app.ingress.endpoint import ingress_app
from serve_app.launch.demo_model import resolve_model
from serve_app.launch.model_kind import model_fault

_CONNECTOR = {
    "kv_connector": "BatonConnector",
    "kv_connector_module_path": "transfer.connector",
    "kv_load_failure_policy": "recompute",
}
_CPU_STEP_TOKENS = 256
"""Longest step of a decode engine, for each of its workers."""
_KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}
_ONE_CORE_ENGINE = {
    # One CPU worker computes inside the engine process, on one core (deployments.replicas.engine).
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
}


def build_app(args: dict[str, Any]) -> Application:
    """Builds the application from the ``args`` of config.yaml.

    Raises:
        SettingsError: a setting is wrong, or the model is one whose prompts cannot be handed
            over; names it and says what would be right.
        ModelError: the demo model is asked for and has not been made yet.
    """
    settings = parse_settings(args)
    _check_engine_arguments(settings)
    if fault := model_fault(settings):
        raise SettingsError(f"model.source: {fault}")
    configs: dict[Role, LLMConfig] = {
        role: llm_config(settings, role) for role in ("prefill", "decode")
    }
    prefill = build_llm_deployment(
        configs["prefill"],
        name_prefix="Prefill:",
        bind_kwargs={"engine_timeout_s": settings.prefill.engine_timeout_s},
        deployment_cls=PrefillServer,
    )
    decode = build_llm_deployment(
        configs["decode"],
        name_prefix="Decode:",
        bind_kwargs={
            "engine_timeout_s": settings.decode.engine_timeout_s,
            "breakers": BreakerPolicy(
                failures=settings.router.link_failures, pause_s=settings.router.link_pause_s
            ),
        },
        deployment_cls=DecodeServer,
    )
    router = settings.router
    api_keys = ApiKeys(router.api_keys)
    ingress = serve.deployment(
        ingress_app(
            limits=BodyLimits(
                max_body_bytes=router.max_body_bytes,
                max_bytes_in_flight=router.max_bytes_in_flight,
                timeout_s=router.body_timeout_s,
            ),
            api_keys=api_keys,
            allowed_origins=tuple(router.allowed_origins),
        ),
        name="Ingress",
        num_replicas=router.replicas,
        max_ongoing_requests=4096,
        # Deployed anew, the next one is there before the only one goes.
        max_surge_percent=100,
        ray_actor_options={"num_cpus": router.cpus_per_replica},
    )
    return ingress.bind(
        prefill=prefill,
        decode=decode,
        model_cards=[
            to_model_metadata(name, configs["decode"])
            for name in (settings.model.id, *settings.adapters())
        ],
        policy=RetryPolicy(
            attempts=router.attempts,
            backoff_s=router.backoff_s,
            backoff_max_s=router.backoff_max_s,
            jitter=router.jitter,
        ),
        admission=AdmissionPolicy(
            max_requests=router.max_requests, max_prefill_wait_s=router.max_prefill_wait_s
        ),
        max_prompts=router.max_prompts,
        prompts_at_once=router.prompts_at_once,
        max_body_bytes=router.max_body_bytes,
        max_prompt_logprobs=router.max_prompt_logprobs,
        max_tokenize_length=router.max_tokenize_length,
        pick_timeout_s=router.pick_timeout_s,
        health_timeout_s=router.health_timeout_s,
        api_keys=api_keys,
        cache_salt_by_key=router.cache_salt_by_key,
    )


def llm_config(settings: Settings, role: Role) -> LLMConfig:
    """Ray's configuration of one side's replicas."""
    side = settings.side(role)
    on_gpu = side.resources.gpus_per_worker > 0
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(
            model_id=settings.model.id, model_source=resolve_model(settings.model.source)
        ),
        engine_kwargs=_engine_kwargs(settings, role),
        accelerator_type=side.resources.accelerator_type,
        accelerator_config={"kind": "gpu" if on_gpu else "cpu"},
        placement_group_config={
            "bundles": [_bundle(side)] * side.tensor_parallel_size,
            "strategy": side.resources.strategy,
        },
        deployment_config=_deployment_config(side),
        runtime_env={"env_vars": _environment(settings, side, on_gpu=on_gpu)},
        # Tokens go out as they come, none waits for others to share a message with.
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=True,
    )


def _check_engine_arguments(settings: Settings) -> None:
    """Names the section of an engine argument that vLLM does not have; Ray would only name it."""
    known = {field.name for cls in (AsyncEngineArgs, FrontendArgs) for field in fields(cls)}
    sections = {
        "engine": settings.engine,
        "prefill.engine": settings.prefill.engine,
        "decode.engine": settings.decode.engine,
    }
    for section, arguments in sections.items():
        for name in arguments:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SettingsError(f"{section}.{name}: vLLM has no such argument{hint}")


def _engine_kwargs(settings: Settings, role: Role) -> dict[str, Any]:
    side = settings.side(role)
    extra = {
        "discovery": settings.discovery,
        # `auto`: the address by which Ray knows the replica's node.
        "transfer": {"host": "auto", **settings.transfer},
        "die_with_parent": True,
    }
    return {
        **(_decode_defaults(settings) if role == "decode" else {}),
        **settings.engine,
        **side.engine,
        "tensor_parallel_size": side.tensor_parallel_size,
        "worker_extension_cls": "transfer.connector.control.WorkerControl",
        "kv_transfer_config": {
            **_CONNECTOR,
            "kv_role": _KV_ROLES[role],
            "kv_connector_extra_config": extra,
        },
    }


def _decode_defaults(settings: Settings) -> dict[str, Any]:
    """Engine arguments of decode that the settings may overrule.

    Prompts that decode computes itself, because a hand-off failed or cannot be used, share its
    steps with its streams, which go on only from step to step. In a step of vLLM's own default
    length a CPU computes for seconds.
    """
    side = settings.decode
    engine = {**settings.engine, **side.engine}
    if side.resources.gpus_per_worker or engine.get("enable_chunked_prefill") is False:
        return {}
    tokens = _CPU_STEP_TOKENS * side.tensor_parallel_size
    streams = engine.get("max_num_seqs")
    # vLLM refuses a step that has no room for a token of each stream.
    return {"max_num_batched_tokens": max(tokens, streams if isinstance(streams, int) else 0)}


def _deployment_config(side: SideSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_ongoing_requests": side.max_ongoing_requests,
        "graceful_shutdown_timeout_s": side.drain_timeout_s,
        # Three failures in a row replace a replica: within 10 s. A check waits for nothing.
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "request_router_config": RequestRouterConfig(request_router_class=HintedRouter),
        "ray_actor_options": {"num_cpus": side.resources.cpus_per_replica},
    }
    if side.autoscaling is not None:
        config["autoscaling_config"] = side.autoscaling.model_dump()
    else:
        config["num_replicas"] = side.replicas
    return config


def _bundle(side: SideSettings) -> dict[str, float]:
    resources = side.resources
    bundle = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return {name: amount for name, amount in bundle.items() if amount} | resources.custom


def _environment(settings: Settings, side: SideSettings, *, on_gpu: bool) -> dict[str, str]:
    environment: dict[str, str] = {}
    if not on_gpu:
        if side.tensor_parallel_size == 1:
            environment |= _ONE_CORE_ENGINE
        if {**settings.engine, **side.engine}.get("enforce_eager"):
            # vLLM's sampler compiles itself all the same on the first request with logprobs: 17 s,
            # and the end of the engine where there is no C++ compiler.
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment | side.env
