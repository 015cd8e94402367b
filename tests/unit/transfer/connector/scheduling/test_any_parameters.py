"""No hook of the connector's scheduler side raises for what a client put into a request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.support.scripted.scheduler_requests import (
    blocks_for,
    decode_request,
    finish,
    make_blocks,
    make_request,
    make_scheduler,
    make_ticket,
    schedule,
    tokens,
)
from tests.support.scripted.tickets import JSON, changed_params
from transfer.connector.metadata import WorkerReport
from transfer.connector.outcomes import ReadOutcome
from transfer.ticket import Ticket

PROMPT = tokens(40)


@given(JSON, st.sampled_from(["producer", "consumer", "both"]))
def test_any_json_as_parameters(params: Any, role: str) -> None:
    scheduler = make_scheduler(role)
    request = make_request([1, 2, 3], params)

    scheduler.on_new_request(request)
    count, waits = scheduler.matched_tokens(request, 0)
    scheduler.after_alloc(request, make_blocks(1), 0)
    scheduler.request_finished(request, [])

    assert (count, waits) == (0, False)
    assert not scheduler.take_metadata(idle=False).offers


@given(
    st.dictionaries(st.sampled_from(["readers", "handoff_id", "do_remote_prefill"]), JSON),
    st.text(min_size=1),
    st.sampled_from(["producer", "both"]),
    st.sampled_from([0, 8]),
)
def test_whatever_comes_with_the_wish_for_a_ticket_a_ticket_is_offered(
    wishes: dict[str, Any], name: str, role: str, num_slots: int
) -> None:
    scheduler = make_scheduler(role, num_slots=num_slots)

    pinned, offered = finish(
        scheduler, PROMPT, params={**wishes, "do_remote_decode": True}, request_id=name
    )

    (offer,) = scheduler.take_metadata(idle=False).offers
    assert pinned
    assert Ticket.from_params(json.loads(json.dumps(offered))) == offer.ticket
    assert offer.ticket.num_tokens == len(PROMPT)


@given(
    changed_params(make_ticket(PROMPT).to_params()),
    st.sampled_from(["consumer", "both"]),
    st.sampled_from([0, 8]),
)
def test_a_ticket_with_any_values_is_read_whole_or_computed(
    params: dict[str, Any], role: str, num_slots: int
) -> None:
    scheduler = make_scheduler(role, num_slots=num_slots)
    request = make_request(PROMPT, params)
    scheduler.on_new_request(request)

    count, waits = schedule(scheduler, request)

    metadata = scheduler.take_metadata(idle=False)
    assert (count, waits) in ((0, False), (len(PROMPT), True))
    assert [read.num_tokens for read in metadata.reads] == [count] * waits
    assert not waits or len(metadata.reads[0].places) == blocks_for(len(PROMPT))
    if waits:
        scheduler.on_loaded({"request-1"}, WorkerReport({"request-1": ReadOutcome.FAILED}))
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    scheduler.request_finished(request, list(range(blocks_for(len(PROMPT)))))
    # Nothing is left of it: another prompt gets all there is.
    after = decode_request(PROMPT, make_ticket(PROMPT, "2"), request_id="after")
    scheduler.on_new_request(after)
    assert schedule(scheduler, after) == (len(PROMPT), True)


@pytest.mark.parametrize("params", ["x", 5, ["do_remote_prefill"], True, 1.5])
def test_parameters_of_another_type_are_none(params: Any) -> None:
    scheduler = make_scheduler("both")
    request = make_request([1, 2, 3], params)

    scheduler.on_new_request(request)

    assert scheduler.request_finished(request, [0]) == (False, None)
