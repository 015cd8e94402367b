"""The settings of an application: ``args`` in config.yaml. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deployments.role import Role
from serve_app.adapters import served_adapters
from serve_app.mooncake_args import with_mooncake
from serve_app.origins import require_origin
from transfer.connector.block_settings import TRANSFER_KEYS, read_transfer
from transfer.discovery import check_discovery
from transfer.errors import ConfigurationError
from transfer.secret import SecretReference
from transfer.speculation import drafting_layers, shares_answers

_RESERVED_ENGINE_KEYS = {
    "model": "set model.source",
    "served_model_name": "set model.id",
    "tokenizer": "put the tokenizer beside the weights",
    "kv_transfer_config": "Baton writes it; set transfer and discovery",
    "worker_extension_cls": "Baton sets it",
    "distributed_executor_backend": "Ray Serve sets it",
    "tensor_parallel_size": "set tensor_parallel_size beside engine",
    "pipeline_parallel_size": "pipeline parallelism is not supported, use tensor_parallel_size",
    "data_parallel_size": "set replicas",
    "api_key": "set router.api_keys",
    "enable_prompt_tokens_details": "vLLM would report every prompt token that was handed over as "
    "cached, and clients may be billed by that",
}

_EQUAL_ENGINE_KEYS = (
    *("dtype", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "quantization", "max_model_len"),
    *("revision", "hf_overrides", "hf_config_path"),
)
"""Engine arguments of which each side's blocks depend, or which prompts the side takes."""


class SettingsError(ValueError):
    """The settings are wrong. One line per fault: where it is and what would be right."""


class Section(BaseModel):
    """A part of the settings."""

    # Inputs may be secrets, and errors end up in logs.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ModelSettings(Section):
    """Which model is served, and under which name."""

    id: str = Field(min_length=1, description="Name that clients use in `model`.")
    source: str = Field(
        min_length=1,
        description="Hugging Face id, local folder, or `baton-demo` for the demo model.",
    )


class AutoscalingSettings(Section):
    """Serve's autoscaling, by the load per replica."""

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        return self


class ResourceSettings(Section):
    """What Ray reserves for one replica, and for each worker of its engine."""

    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.1
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    accelerator_type: str | None = Field(
        default=None, description="Ray's name of the GPU type, for example `H100`."
    )
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Custom Ray resources of each worker, for example {baton_prefill: 1}.",
    )
    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"

    @field_validator("custom")
    @classmethod
    def _no_standard_names(cls, custom: dict[str, float]) -> dict[str, float]:
        for name, right in (("CPU", "cpus_per_worker"), ("GPU", "gpus_per_worker")):
            if name in custom:
                raise ValueError(f"{name} is not a custom resource: set {right}")
        return custom

    @model_validator(mode="after")
    def _reserves_what_it_names(self) -> ResourceSettings:
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type}, but gpus_per_worker is 0; "
                "set gpus_per_worker, or leave accelerator_type out"
            )
        if not (self.cpus_per_worker or self.gpus_per_worker or self.custom):
            raise ValueError("set cpus_per_worker or gpus_per_worker: a worker reserves nothing")
        return self


class SideSettings(Section):
    """One side, prefill or decode."""

    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: AutoscalingSettings | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    engine: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine arguments of this side only."
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of this side's replicas and engines."
    )
    resources: ResourceSettings = ResourceSettings()
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 1024
    drain_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    engine_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @field_validator("engine")
    @classmethod
    def _no_reserved(cls, engine: dict[str, Any]) -> dict[str, Any]:
        return _check_engine(engine)

    @model_validator(mode="before")
    @classmethod
    def _replicas_or_autoscaling(cls, data: Any) -> Any:
        if isinstance(data, dict) and "replicas" in data and data.get("autoscaling") is not None:
            raise ValueError("set either replicas or autoscaling, not both")
        return data


def _reference(text: str) -> str:
    try:
        SecretReference.parse(text)
    except ConfigurationError as error:
        raise ValueError(error.message) from error
    return text


class RouterSettings(Section):
    """The ingress and its retry budget."""

    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.1
    api_keys: list[Annotated[str, AfterValidator(_reference)]] = Field(
        default_factory=list,
        description="Where bearer keys are, see transfer.secret; empty: anybody may ask.",
    )
    cache_salt_by_key: bool = Field(
        default=False, description="Clients of different keys share no KV, see cache_salt."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    max_prompts: Annotated[int, Field(ge=1)] = 128
    prompts_at_once: Annotated[int, Field(ge=1)] = 16
    max_bytes_in_flight: Annotated[int, Field(ge=1024)] = 256 << 20
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_prompt_logprobs: Annotated[int, Field(ge=1)] = 1 << 18
    max_tokenize_length: Annotated[int, Field(ge=1)] = 1 << 20
    allowed_origins: list[str] = Field(
        default_factory=lambda: ["*"],
        description="Origins whose pages may call from a browser; `*`: all; empty: none.",
    )
    max_requests: Annotated[int, Field(ge=1)] = 1024
    max_prefill_wait_s: Annotated[float, Field(gt=0)] = 60.0
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    backoff_s: Annotated[float, Field(ge=0)] = 0.05
    backoff_max_s: Annotated[float, Field(ge=0)] = 2.0
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.5
    link_failures: Annotated[int, Field(ge=1)] = 3
    link_pause_s: Annotated[float, Field(gt=0)] = 30.0
    pick_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    health_timeout_s: Annotated[float, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _one_body_fits(self) -> RouterSettings:
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_in_flight ({self.max_bytes_in_flight}) is below max_body_bytes "
                f"({self.max_body_bytes}): a body of that length could never come"
            )
        return self

    @model_validator(mode="after")
    def _keys_to_salt_by(self) -> RouterSettings:
        if self.cache_salt_by_key and not self.api_keys:
            raise ValueError("cache_salt_by_key is set, but there are no api_keys to go by")
        return self

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            require_origin(origin)
        return origins


class Settings(Section):
    """All settings of one application."""

    model: ModelSettings
    engine: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine arguments of both sides."
    )
    prefill: SideSettings = SideSettings()
    decode: SideSettings = SideSettings()
    transfer: dict[str, Any] = Field(
        default_factory=dict, description="See transfer.connector.block_settings."
    )
    discovery: dict[str, Any] = Field(
        description="How workers find each other: kind `etcd` or `static`."
    )
    router: RouterSettings = RouterSettings()

    @field_validator("engine")
    @classmethod
    def _no_reserved(cls, engine: dict[str, Any]) -> dict[str, Any]:
        return _check_engine(engine)

    @field_validator("transfer")
    @classmethod
    def _known_transfer(cls, transfer: dict[str, Any]) -> dict[str, Any]:
        for name in transfer:
            if name not in TRANSFER_KEYS:
                raise ValueError(f"{name} is unknown; known are {', '.join(TRANSFER_KEYS)}")
        try:
            read_transfer(transfer)
        except ConfigurationError as error:
            raise ValueError(error.message) from error
        return transfer

    @field_validator("discovery")
    @classmethod
    def _known_discovery(cls, discovery: dict[str, Any]) -> dict[str, Any]:
        try:
            check_discovery(discovery)
        except ConfigurationError as error:
            raise ValueError(error.message) from error
        return discovery

    @model_validator(mode="after")
    def _sides_agree(self) -> Settings:
        engines = self._engines()
        served_adapters(self.model.id, engines)
        for name in _EQUAL_ENGINE_KEYS:
            values = [engine.get(name) for engine in engines]
            if values[0] != values[1]:
                raise ValueError(
                    f"{name} is {values[0]} for prefill and {values[1]} for decode; KV blocks mean "
                    "the same on both sides only if it is equal, so set it in engine"
                )
        backends = [engine.get("attention_backend") for engine in engines]
        if None not in backends and backends[0] != backends[1]:
            raise ValueError(
                f"attention_backend is {backends[0]} for prefill and {backends[1]} for decode; "
                "blocks of one are not handed over to the other, so set it in engine"
            )
        drafting = [drafting_layers(engine) for engine in engines]
        if drafting[0] != drafting[1]:
            raise ValueError(
                f"speculative_config has {drafting[0] or 'no layers'} for prefill and "
                f"{drafting[1] or 'no layers'} for decode; speculation with layers of its own must "
                "be equal on both sides, so set it in engine. One side alone may have "
                "method ngram, suffix or medusa"
            )
        sizes = [
            size
            for engine in engines
            if isinstance(size := engine.get("block_size"), int) and size > 0
        ]
        if len(sizes) == 2 and max(sizes) % min(sizes):
            raise ValueError(
                f"block_size is {sizes[0]} for prefill and {sizes[1]} for decode; one must be a "
                "multiple of the other"
            )
        return self

    @model_validator(mode="after")
    def _nothing_shared_beside_the_salt(self) -> Settings:
        if self.router.cache_salt_by_key:
            for role, side in (("prefill", self.prefill), ("decode", self.decode)):
                if shares_answers({**self.engine, **side.engine}):
                    raise ValueError(
                        f"speculative_config of {role} has method suffix, which drafts from the "
                        "answers of all clients, and router.cache_salt_by_key is to keep them "
                        "apart; set suffix_decoding_max_cached_requests to 0 beside the method"
                    )
        return self

    def side(self, role: Role) -> SideSettings:
        """The settings of one side."""
        return self.prefill if role == "prefill" else self.decode

    def adapters(self) -> tuple[str, ...]:
        """Names by which clients may ask for LoRA adapters of the model."""
        return served_adapters(self.model.id, self._engines())

    def _engines(self) -> list[dict[str, Any]]:
        return [{**self.engine, **side.engine} for side in (self.prefill, self.decode)]


def parse_settings(args: Any) -> Settings:
    """Checks ``args`` as they come from YAML.

    Raises:
        SettingsError: lists every fault with its key's path, or file and field.
    """
    try:
        return Settings.model_validate(with_mooncake(args))
    except ConfigurationError as error:
        raise SettingsError(error.message) from error
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"]) or "args"
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                message = f"unknown key; {_known_keys(fault['loc'])}"
            lines.append(f"{path}: {message}")
        raise SettingsError("\n".join(lines)) from error


def _check_engine(engine: dict[str, Any]) -> dict[str, Any]:
    for name, advice in _RESERVED_ENGINE_KEYS.items():
        if name in engine:
            raise ValueError(f"{name} cannot be set here: {advice}")
    if isinstance(engine.get("hf_token"), str):
        raise ValueError(
            "hf_token is not written out here: set HF_TOKEN in the environment of every machine"
        )
    return engine


def _known_keys(location: tuple[int | str, ...]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(
            (item for item in options if isinstance(item, type) and issubclass(item, Section)),
            None,
        )
        if section is None:
            return "remove it"
    return f"known here are {', '.join(section.model_fields)}"
