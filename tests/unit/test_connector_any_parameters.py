"""No hook of the connector's scheduler side raises for what a client put into a request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_requests import make_request, make_scheduler

NAMES = st.sampled_from(
    ["do_remote_prefill", "do_remote_decode", "version", "tickets", "readers", "handoff_id"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["producer", "consumer", "both"]))
def test_any_json_as_parameters(params: Any, role: str) -> None:
    scheduler = make_scheduler(role)
    request = make_request([1, 2, 3], params)

    scheduler.on_new_request(request)
    count, waits = scheduler.matched_tokens(request, 0)
    scheduler.request_finished(request, [])

    assert (count, waits) == (0, False)
    assert not scheduler.take_metadata(idle=False).offers


@pytest.mark.parametrize("params", ["x", 5, ["do_remote_prefill"], True, 1.5])
def test_parameters_of_another_type_are_none(params: Any) -> None:
    scheduler = make_scheduler("both")
    request = make_request([1, 2, 3], params)

    scheduler.on_new_request(request)

    assert scheduler.request_finished(request, [0]) == (False, None)
