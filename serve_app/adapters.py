"""LoRA adapters that engines load when they start, as the settings name them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Adapter(BaseModel):
    """An entry of vLLM's ``lora_modules``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


_LIST = TypeAdapter(list[_Adapter] | None)


def adapter_names(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """The names by which clients ask for the adapters in an engine's ``lora_modules``.

    Raises:
        ValueError: ``lora_modules`` is not what vLLM loads; says where, and what would be right.
    """
    try:
        adapters = _LIST.validate_python(engine.get("lora_modules")) or []
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, ("lora_modules", *fault["loc"])))
        raise ValueError(
            f"{where}: {fault['msg']}; write a list of adapters like "
            "{name: pirate, path: /models/pirate}"
        ) from error
    names = tuple(adapter.name for adapter in adapters)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"lora_modules has two adapters with the name {twice}")
    if names and not engine.get("enable_lora"):
        raise ValueError("lora_modules needs enable_lora: true")
    return names


def served_adapters(model_id: str, engines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The adapters that both sides' engines have, in order of their names.

    Raises:
        ValueError: as :func:`adapter_names`; or one side lacks some; or one has the model's name.
    """
    prefill, decode = (frozenset(adapter_names(engine)) for engine in engines)
    if lacking := sorted(prefill ^ decode):
        raise ValueError(
            f"lora_modules has {', '.join(lacking)} on one side only; both sides need the same "
            "names, so set it in engine"
        )
    if model_id in decode:
        raise ValueError(f"lora_modules has an adapter with the model's own name, {model_id}")
    return tuple(sorted(decode))
