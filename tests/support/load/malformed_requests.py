"""Bodies as no client should send them, made from the request models themselves."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

NUMBERS: Final = (0, -1, 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30)
SMALL: Final = (0, -1, 1, 2, 3, 7, 300, 5000, -5)
FLOATS: Final = (
    0.5,
    2.5,
    0.0,
    -3.0,
    -0.5,
    1e30,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)
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
    "structured_outputs": st.fixed_dictionaries(
        {},
        optional={
            "json": JUNK | st.just({"type": "smell"}) | st.just({"type": "string", "pattern": "("}),
            "regex": st.sampled_from(["(", "a{2,1}", "[", "a{3}", "", "\\"]),
            "choice": st.lists(st.sampled_from(TEXTS), max_size=2) | JUNK,
            "grammar": st.sampled_from(['root ::= "a"', "root ::=", "", "start: x"]) | JUNK,
            "json_object": JUNK,
            "structural_tag": JUNK,
        },
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

_SELDOM: Final = st.sampled_from([False, False, False, True])


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """What a field of this type may hold, and what is a little beyond."""
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.sampled_from(SMALL) | st.sampled_from(NUMBERS)
    if annotation is float:
        return st.sampled_from(FLOATS)
    if annotation is str:
        return st.sampled_from(TEXTS)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(inner[0])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(TEXTS) | st.just("5"), values(inner[1]), max_size=2)
    if origin in (Union, UnionType):
        return st.one_of([values(kind) for kind in inner])
    return JUNK


@st.composite
def bodies(draw: st.DrawFn, model: type[BaseModel], good: dict[str, Any]) -> dict[str, Any]:
    """A good body in which some fields are not what they should be, or only just."""
    fields = model.model_fields
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    likely = {name: _SHAPED.get(name, values(fields[name].annotation)) for name in names}
    changes = {name: draw(JUNK if draw(_SELDOM) else likely[name]) for name in names}
    return {**good, **changes}


def corpus(
    model: type[BaseModel], good: dict[str, Any], count: int, number: int
) -> list[dict[str, Any]]:
    """``count`` of :func:`bodies`, the same ones for the same ``number``."""
    made: list[dict[str, Any]] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(model, good))
    def collect(body: dict[str, Any]) -> None:
        made.append(body)

    collect()
    return made
