"""What clients may not say, and how far numbers may go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.edge import Fault, refusal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"KV-Transfer-Params": "x"}, "KV-Transfer-Params"),
        ({"ec_transfer_params": {"a": 1}}, "ec_transfer_params"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params"),
        ({"vllm_xargs": {"kv_transfer_params": None}}, "vllm_xargs.kv_transfer_params"),
        ({"vllm_xargs": {" Do_Remote_Decode": 1}}, "vllm_xargs. Do_Remote_Decode"),
        ({"vllm_xargs": {"sent_token_ids": [1]}}, "vllm_xargs.sent_token_ids"),
    ],
)
def test_names_that_are_not_a_clients_are_refused_in_every_place_and_spelling(
    fields: dict[str, Any], param: str
) -> None:
    assert refusal(fields, {}) == Fault(param, f"{param}: only Baton itself may set it")


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 10**400])
def test_a_priority_beyond_the_engines_numbers_is_refused(value: int) -> None:
    in_body, in_header = {"priority": value}, {"x-vllm-priority": f"{value}"}

    assert refusal(in_body, {}) is not None
    assert refusal({}, in_header) is not None


def test_a_header_of_more_digits_than_python_reads_is_refused() -> None:
    assert refusal({}, {"x-vllm-priority": "9" * 5000}) == Fault(
        "x-vllm-priority", "x-vllm-priority: it must be a whole number of at most 64 bits"
    )


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"prompt": "p", "kv_transfer_params": None}, {}),
        ({"vllm_xargs": {"other": 1}, "priority": -3}, {"x-vllm-priority": " 7 "}),
        ({"priority": (1 << 63) - 1}, {"x-vllm-priority": "soon"}),
    ],
)
def test_the_rest_passes(fields: dict[str, Any], headers: dict[str, str]) -> None:
    assert refusal(fields, headers) is None


@given(st.dictionaries(st.text() | st.just("vllm_xargs") | st.just("priority"), JSON), st.text())
def test_any_json_and_any_header_get_an_answer(fields: dict[str, Any], header: str) -> None:
    fault = refusal(fields, {"x-vllm-priority": header})

    assert fault is None or fault.message.startswith(fault.param)
