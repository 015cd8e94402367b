"""Fields that Baton looks at, as vLLM's request models read them. Pure.

The models take ``"2"`` and ``2.0`` for 2 and ``"true"`` for true. Who looks at a body before them,
or in their place, must see what they will see: else one request is two to two readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

READ: Final[Mapping[str, TypeAdapter[Any]]] = {
    "prompt": TypeAdapter(list[int] | list[list[int]] | str | list[str]),
    "n": TypeAdapter(int),
    "priority": TypeAdapter(int),
    "truncate_prompt_tokens": TypeAdapter(int),
    # Whole numbers stay whole, to be judged by their digits.
    "length_penalty": TypeAdapter(int | float),
    "use_beam_search": TypeAdapter(bool),
    "echo": TypeAdapter(bool),
}
"""The models' types of these fields, without bounds and without None, which stays what it is."""


def as_read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body with these fields as the models read them.

    What a model would not take stays as it came, for the model to refuse.
    """
    return {name: _as_read(name, value) for name, value in fields.items()}


def _as_read(name: str, value: Any) -> Any:
    adapter = READ.get(name)
    if adapter is None:
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return value
