"""What Baton reads in a body is what vLLM's models read in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from serve_app.edge.lax_fields import READ, as_read
from tests.support.load.malformed_requests import JUNK

NUMBERS = st.integers(-3, 5) | st.floats() | st.booleans() | st.integers()
TEXTS = NUMBERS.map(str) | st.sampled_from([" 2 ", "2.0", "+2", "1_0", "9" * 5000, "off", "\ud800"])
LISTS = st.lists(NUMBERS | TEXTS, max_size=3)
PLACES = [
    (model, name)
    for model in (CompletionRequest, ChatCompletionRequest)
    for name in READ
    if name in model.model_fields
]


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"n": "2"}, {"n": 2}),
        ({"n": 2.0}, {"n": 2}),
        ({"n": None}, {"n": None}),
        ({"n": "two"}, {"n": "two"}),
        ({"n": 2.5}, {"n": 2.5}),
        ({"truncate_prompt_tokens": "-1"}, {"truncate_prompt_tokens": -1}),
        ({"length_penalty": "-5000"}, {"length_penalty": -5000}),
        ({"length_penalty": "1e9"}, {"length_penalty": 1e9}),
        ({"use_beam_search": "no", "echo": "yes"}, {"use_beam_search": False, "echo": True}),
        ({"prompt": "2"}, {"prompt": "2"}),
        ({"prompt": ["1", "2"]}, {"prompt": ["1", "2"]}),
        ({"prompt": [1.0, "2"]}, {"prompt": [1, 2]}),
        ({"prompt": [[1.0], ["2"]]}, {"prompt": [[1], [2]]}),
        ({"prompt": ["a", 1.0]}, {"prompt": ["a", 1.0]}),
        ({"max_tokens": "5", "else": "7"}, {"max_tokens": "5", "else": "7"}),
    ],
)
def test_fields_are_read_as_numbers_where_they_are_numbers(
    fields: dict[str, Any], read: dict[str, Any]
) -> None:
    assert json.dumps(as_read(fields)) == json.dumps(read)


@pytest.mark.parametrize(
    ("model", "name"), PLACES, ids=[f"{model.__name__}-{name}" for model, name in PLACES]
)
def test_what_a_model_takes_it_is_given_as_it_would_read_it(
    model: type[BaseModel], name: str
) -> None:
    annotation: Any = model.model_fields[name].annotation
    theirs: TypeAdapter[Any] = TypeAdapter(annotation)

    @given(NUMBERS | TEXTS | LISTS | st.lists(LISTS, max_size=3) | JUNK)
    def check(value: Any) -> None:
        read = as_read({name: value})[name]
        try:
            taken = theirs.validate_python(value)
        except ValidationError:
            with pytest.raises(ValidationError):
                theirs.validate_python(read)
        else:
            if isinstance(taken, float) and type(read) is int:
                read = float(read)
            assert repr(read) == repr(taken)

    check()
