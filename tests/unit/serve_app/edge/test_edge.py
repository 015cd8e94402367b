"""What clients may not say, and how far numbers may go."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.edge.request_edge import INT64, MAX_DEPTH, Fault, body_fault, header_fault

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
ONLY_BATON = "only Baton itself may set it"
BETWEEN = "it must be between -9223372036854775808 and 9223372036854775807"
ON_THE_WIRE = "it must be between -9223372036854775808 and 18446744073709551615"
NAME = "it must be a text of at most 256 characters"
NO_TEXT = "the character 2 is half of a surrogate pair"


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
    assert body_fault(fields) == Fault(param, ONLY_BATON)


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 10**400])
def test_a_priority_beyond_the_engines_numbers_is_refused(value: int) -> None:
    assert body_fault({"priority": value}) is not None
    assert header_fault({"x-vllm-priority": f"{value}"}) == Fault("x-vllm-priority", BETWEEN)


def test_a_header_of_more_digits_than_python_reads_is_refused() -> None:
    assert header_fault({"x-vllm-priority": "9" * 5000}) == Fault("x-vllm-priority", BETWEEN)


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"prompt": "p", "kv_transfer_params": None}, {}),
        ({"vllm_xargs": {"other": 1}, "priority": -3}, {"x-vllm-priority": " 7 "}),
        ({"priority": (1 << 63) - 1}, {"x-vllm-priority": "soon"}),
        ({"priority": -(1 << 63)}, {"x-vllm-priority": "-9223372036854775808"}),
        ({}, {"x-vllm-priority": "9223372036854775807"}),
        ({}, {"x-vllm-priority": "+-5"}),
        ({}, {"x-vllm-priority": "1__0"}),
        ({"json": {"maximum": (1 << 64) - 1, "minimum": -(1 << 63)}}, {}),
        ({"prompt": [5, 7] * 9, "text": "\U0001f600", "length_penalty": 1e300}, {}),
        ({"use_beam_search": True, "length_penalty": -2.5}, {}),
        ({"request_id": "\n" * 256}, {}),
        ({"request_id": None}, {}),
    ],
)
def test_the_rest_passes(fields: dict[str, Any], headers: dict[str, str]) -> None:
    assert body_fault(fields) is None
    assert header_fault(headers) is None


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"vllm_xargs": {"a": [1.0, 1 << 64]}}, Fault("vllm_xargs.a.1", ON_THE_WIRE)),
        ({"prompt": [1, 2, 10**400]}, Fault("prompt.2", ON_THE_WIRE)),
        ({"unknown": float("nan")}, Fault("unknown", "it must be a finite number")),
        ({"logit_bias": {"5": float("-inf")}}, Fault("logit_bias.5", "it must be a finite number")),
        ({"prompt": "ab\ud800"}, Fault("prompt", NO_TEXT)),
        ({"stop": ["a", "ab\udfff"]}, Fault("stop.1", NO_TEXT)),
        ({"request_id": "r" * 257}, Fault("request_id", NAME)),
        ({"request_id": 7}, Fault("request_id", NAME)),
        ({"ab\ud800": 1}, Fault("", f"a name in it is no text: {NO_TEXT}")),
        ({"a": {"ab\ud800": 1}}, Fault("a", f"a name in it is no text: {NO_TEXT}")),
        (
            {"use_beam_search": True, "length_penalty": 40.5},
            Fault("length_penalty", "with use_beam_search it must be between -40 and 40"),
        ),
    ],
)
def test_what_the_engines_messages_do_not_hold_is_refused(
    fields: dict[str, Any], fault: Fault
) -> None:
    assert body_fault(fields) == fault


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def test_nothing_is_nested_deeper_than_programs_recurse() -> None:
    assert body_fault({"deep": nested(MAX_DEPTH - 1)}) is None

    fault = body_fault({"deep": nested(900)})

    assert fault is not None
    assert fault.field.startswith("deep.")
    assert len(fault.field) < 300
    assert "more than 100 lists and objects" in fault.message


@given(
    st.dictionaries(st.text() | st.sampled_from(["vllm_xargs", "priority"]), JSON),
    st.text(),
)
def test_any_json_and_any_header_get_an_answer_that_can_be_sent(
    fields: dict[str, Any], header: str
) -> None:
    for fault in (body_fault(fields), header_fault({"x-vllm-priority": header})):
        if fault is not None:
            assert fault.message
            json.dumps([fault.param, fault.message], ensure_ascii=False).encode()


@given(st.dictionaries(st.text(), JSON))
def test_what_passes_can_be_sent(fields: dict[str, Any]) -> None:
    if body_fault(fields) is None:
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
        assert fields.get("priority", 0) is not int or fields["priority"] in INT64
