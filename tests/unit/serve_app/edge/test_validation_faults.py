"""Of what pydantic says of a body, clients get what helps them most."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from serve_app.edge.request_edge import Fault
from serve_app.edge.validation_faults import first_fault


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([], ("", "the request is malformed")),
        ([{"loc": (), "msg": "bad"}], ("", "bad")),
        ([{"loc": ("body",), "msg": "bad"}], ("", "bad")),
        ([{"loc": ("body", "n"), "msg": "bad"}], ("n", "bad")),
        ([{"loc": ("body", "n"), "msg": "Value error, bad"}], ("n", "bad")),
        ([{"loc": ("body", "body", "path"), "msg": "bad"}], ("body.path", "bad")),
        # A fault that names a field says most.
        (
            [{"loc": ("body",), "msg": "no object"}, {"loc": ("body", "n"), "msg": "bad"}],
            ("n", "bad"),
        ),
    ],
)
def test_the_first_fault_with_a_field_is_told(faults: list[Any], told: tuple[str, str]) -> None:
    assert first_fault(faults) == Fault(*told)


class User(TypedDict):
    role: Literal["user"]
    content: str | list[str]


class Tool(TypedDict):
    role: Literal["tool"]
    content: str
    tool_call_id: str


class Body(BaseModel):
    messages: list[User | Tool] = []
    stop: str | Annotated[list[str], Field(max_length=2)] = ""
    choice: Literal["auto"] | Literal["none"] | Tool = "auto"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stop": ["a"] * 3}, ("stop", "List should have at most 2 items after validation, not 3")),
        ({"stop": 5}, ("stop", "Input should be a valid string")),
        ({"stop": ["a", 5]}, ("stop.1", "Input should be a valid string")),
        ({"messages": [{"role": "user"}]}, ("messages.0.content", "Field required")),
        (
            {"messages": [{"role": "user", "content": ["a", 7]}]},
            ("messages.0.content.1", "Input should be a valid string"),
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            ("messages.0.tool_call_id", "Field required"),
        ),
        ({"choice": 5}, ("choice", "Input should be 'auto' or 'none'")),
    ],
)
def test_of_a_value_of_several_kinds_the_nearest_tells_where_it_is_wrong(
    fields: dict[str, Any], told: tuple[str, str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Body).validate_python(fields)

    assert first_fault(caught.value.errors(), fields) == Fault(*told)
