"""Bodies as no client should send them, made from the request models themselves."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st
from pydantic import BaseModel

NUMBERS: Final = (0, -1, 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30)
FLOATS: Final = (0.5, -0.5, 1e30, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS: Final = ("", "a", " ", "\x00", "\ud800", "x" * 300, "nan", "1e999", "9" * 30, "ünï", "[")

LEAVES: Final = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(FLOATS)
    | st.sampled_from(TEXTS)
)
NAMES: Final = st.sampled_from(["type", "text", "content", "role", "name", "json", "schema", "a"])
JUNK: Final = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)

_PARTS: Final = JUNK | st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "smell", "image_url", "refusal", "thinking"]) | LEAVES},
    optional={"text": JUNK, "image_url": JUNK, "thinking": JUNK, "refusal": JUNK, "uuid": JUNK},
)
_CALLS: Final = JUNK | st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function") | LEAVES},
        optional={
            "id": JUNK,
            "function": JUNK | st.fixed_dictionaries({"name": JUNK, "arguments": JUNK}),
        },
    ),
    max_size=2,
)
_MESSAGES: Final = JUNK | st.lists(
    JUNK
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer"]) | LEAVES},
        optional={
            "content": JUNK | st.lists(_PARTS, max_size=3),
            "tool_calls": _CALLS,
            "tool_call_id": JUNK,
            "name": JUNK,
            "reasoning_content": JUNK,
        },
    ),
    min_size=1,
    max_size=3,
)
_TOOLS: Final = JUNK | st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function") | LEAVES},
        optional={
            "function": JUNK
            | st.fixed_dictionaries({"name": LEAVES}, optional={"parameters": JUNK, "strict": JUNK})
        },
    ),
    max_size=2,
)
_SHAPED: Final[dict[str, st.SearchStrategy[Any]]] = {
    "messages": _MESSAGES,
    "tools": _TOOLS,
    "tool_choice": JUNK
    | st.sampled_from(["auto", "required", "none"])
    | st.fixed_dictionaries({"type": LEAVES, "function": JUNK | st.just({"name": "f"})}),
    "structured_outputs": JUNK
    | st.dictionaries(
        st.sampled_from(["json", "regex", "choice", "grammar", "json_object", "structural_tag"]),
        JUNK,
        min_size=1,
        max_size=2,
    ),
    "response_format": JUNK
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "structural_tag"])},
        optional={
            "json_schema": JUNK | st.fixed_dictionaries({"name": LEAVES, "schema": JUNK}),
            "format": JUNK,
        },
    ),
    "stop": JUNK | st.lists(st.sampled_from(TEXTS), min_size=5, max_size=40),
    "repetition_detection": JUNK
    | st.dictionaries(
        st.sampled_from(["max_pattern_size", "min_pattern_size", "min_count"]), LEAVES, max_size=3
    ),
    "model": st.just("other") | LEAVES,
}


@st.composite
def bodies(draw: st.DrawFn, model: type[BaseModel], good: dict[str, Any]) -> dict[str, Any]:
    """A good body in which one to three fields are whatever came to mind."""
    names = draw(
        st.lists(st.sampled_from(sorted(model.model_fields)), min_size=1, max_size=3, unique=True)
    )
    return {**good, **{name: draw(_SHAPED.get(name, JUNK)) for name in names}}
