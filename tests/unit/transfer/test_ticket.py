from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.engine.handoff import Offer
from transfer.errors import ProtocolError
from transfer.spans import empty_spans
from transfer.ticket import (
    MAX_READERS,
    MAX_TP_SIZE,
    TICKET_VERSION,
    Medium,
    Ticket,
    UnreadableTicket,
    prompt_hash,
    read_ticket,
    ticket_request,
)
from transfer.types import Credentials

TICKET = Ticket(
    handoff_id="0123456789abcdef" * 2,
    engine_id="prefill-a",
    incarnation="fedcba9876543210" * 2,
    fence=7,
    secret="a" * 32,
    request_id="chatcmpl-1",
    block_ids=(4, 0, 9),
    num_tokens=33,
    block_size=16,
    kv_axes="BHNC",
    tp_size=2,
    layout_hash="b" * 64,
    prompt_hash="c" * 64,
    readers=3,
    expires_at_s=1_700_000_000.25,
)
GOOD = TICKET.to_params()
REQUIRED = sorted(set(GOOD) - {"do_remote_prefill", "do_remote_decode"})

hex32 = st.text("0123456789abcdef", min_size=32, max_size=32)
hex64 = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.text(st.characters().filter(str.isprintable), min_size=1, max_size=40)


@st.composite
def tickets(draw: st.DrawFn) -> Ticket:
    block_size = draw(st.integers(1, 64))
    block_ids = draw(st.lists(st.integers(0, 1 << 39), min_size=1, max_size=6))
    full = (len(block_ids) - 1) * block_size
    return Ticket(
        handoff_id=draw(hex32),
        engine_id=draw(names),
        incarnation=draw(hex32),
        fence=draw(st.integers(1, (1 << 63) - 1)),
        secret=draw(hex32),
        request_id=draw(names),
        block_ids=tuple(block_ids),
        num_tokens=full + draw(st.integers(1, block_size)),
        block_size=block_size,
        kv_axes=draw(st.sampled_from(["BHNC", "BNHC"])),
        tp_size=draw(st.integers(1, MAX_TP_SIZE)),
        layout_hash=draw(hex64),
        prompt_hash=draw(hex64),
        readers=draw(st.integers(1, MAX_READERS)),
        expires_at_s=draw(st.floats(0, 1e12)),
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 1 << 40, 16])
    | st.floats()
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(GOOD)) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def outcome(params: Any) -> Ticket | ProtocolError:
    try:
        return Ticket.from_params(params)
    except ProtocolError as error:
        return error


def refusal(params: Any) -> str:
    with pytest.raises(ProtocolError) as caught:
        Ticket.from_params(params)
    return caught.value.message


# ---- reading and writing -------------------------------------------------------------------------


def test_wire_format_is_the_documented_one() -> None:
    assert GOOD == {
        "version": 2,
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "prefill-a",
        "remote_request_id": "chatcmpl-1",
        "remote_block_ids": [4, 0, 9],
        "tp_size": 2,
        "handoff_id": "0123456789abcdef" * 2,
        "incarnation": "fedcba9876543210" * 2,
        "fence": 7,
        "num_tokens": 33,
        "block_size": 16,
        "layout_hash": "b" * 64,
        "prompt_hash": "c" * 64,
        "secret": "a" * 32,
        "readers": 3,
        "kv_axes": "BHNC",
        "expires_at": 1_700_000_000.25,
    }


@given(tickets())
def test_round_trip_through_json(ticket: Ticket) -> None:
    assert Ticket.from_params(json.loads(json.dumps(ticket.to_params()))) == ticket


def test_unknown_extra_fields_are_ignored() -> None:
    assert Ticket.from_params({**GOOD, "hint": "of a later version"}) == TICKET


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_field_is_named(field: str) -> None:
    params = {name: value for name, value in GOOD.items() if name != field}

    assert refusal(params) == f"the ticket has no {field}"


WRONG_TYPES: dict[str, list[Any]] = {
    "version": ["1", 1.0, True, None],
    "remote_engine_id": [7, None, ["prefill-a"]],
    "remote_request_id": [7, None, {}],
    "remote_block_ids": ["4", 4, None, {"4": 4}, [4, "0", 9], [4, 0.0, 9], [4, True, 9], [4, [0]]],
    "tp_size": ["2", 2.0, True, None],
    "handoff_id": [7, None, ["0123456789abcdef" * 2]],
    "incarnation": [7, None],
    "fence": ["7", 7.0, True, None],
    "num_tokens": ["33", 33.0, True, None],
    "block_size": ["16", 16.0, True, None],
    "kv_axes": [7, None, ["BHNC"]],
    "layout_hash": [7, None],
    "prompt_hash": [7, None],
    "secret": [7, None],
    "readers": ["3", 3.0, True, None],
    "expires_at": ["soon", None, True, [1.0]],
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "version": [-1, 1 << 32],
    "remote_engine_id": ["", "x" * 513, "a\nINFO b", "\ud800"],
    "remote_request_id": ["", "x" * 513, "a\nINFO b", "\u2028"],
    "remote_block_ids": [[], [4, -1, 9], [4, 1 << 40, 9]],
    "tp_size": [0, -1, MAX_TP_SIZE + 1, 1 << 12],
    "handoff_id": ["", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n"],
    "incarnation": ["", "a" * 31, "a" * 33, "a" * 31 + "-", "a" * 32 + "\n"],
    "fence": [0, -1, 1 << 63],
    "num_tokens": [0, -33, (1 << 40) + 1],
    "block_size": [0, -16, (1 << 20) + 1],
    "kv_axes": ["", "x" * 513],
    "layout_hash": ["", "b" * 63, "b" * 65, "B" * 64, "b" * 64 + "\n"],
    "prompt_hash": ["", "c" * 63, "c" * 65, "C" * 64],
    "secret": ["", "a" * 31, "a" * 33, "Z" * 32],
    "readers": [0, -1, MAX_READERS + 1],
    "expires_at": [float("nan"), float("inf"), float("-inf"), 10**400, 1e300],
}


def test_the_tables_below_cover_every_field() -> None:
    assert sorted(WRONG_TYPES) == REQUIRED
    assert sorted(OUT_OF_RANGE) == REQUIRED


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_TYPES.items() for value in values],
)
def test_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    assert field in refusal({**GOOD, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in OUT_OF_RANGE.items() for value in values],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    assert field in refusal({**GOOD, field: value})


@pytest.mark.parametrize("num_tokens", [32, 49])
def test_number_of_blocks_must_fit_the_tokens(num_tokens: int) -> None:
    message = refusal({**GOOD, "num_tokens": num_tokens})

    assert message.startswith("remote_block_ids has 3 blocks")
    assert f"{num_tokens} tokens" in message


@pytest.mark.parametrize("num_tokens", [33, 47, 48])
def test_last_block_may_be_partly_filled(num_tokens: int) -> None:
    ticket = Ticket.from_params({**GOOD, "num_tokens": num_tokens})

    assert ticket == dataclasses.replace(TICKET, num_tokens=num_tokens)


@pytest.mark.parametrize("version", [0, 1, 3, 1 << 31])
def test_unknown_version_is_refused_before_anything_else_is_read(version: int) -> None:
    message = refusal({"version": version})

    assert message == f"ticket version {version} is not supported, only {TICKET_VERSION}"


@pytest.mark.parametrize("params", [None, True, 3, "ticket", [GOOD], [], 0.5])
def test_what_is_no_object_is_refused(params: Any) -> None:
    assert refusal(params) == "a ticket must be a JSON object"


# ---- whatever comes in ---------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)) | st.text(max_size=5), json_values) | json_values
)
def test_any_params_give_a_ticket_or_protocol_error(params: Any) -> None:
    result = outcome(params)

    assert result.message if isinstance(result, ProtocolError) else result.handoff_id


@given(json_values | st.fixed_dictionaries({"handoff_id": json_values}))
def test_whatever_names_a_handoff_can_be_told_to_its_owner(params: Any) -> None:
    name = read_ticket(params).handoff_id

    assert name == "" or params["handoff_id"] == name


def test_a_ticket_that_can_be_read() -> None:
    assert read_ticket(GOOD) == Ticket.from_params(GOOD)


def test_the_id_of_a_ticket_that_cannot_be_read() -> None:
    said = read_ticket({**GOOD, "version": 99})
    assert isinstance(said, UnreadableTicket)
    assert said.handoff_id == GOOD["handoff_id"]
    assert "version 99" in said.fault
    for params in ({}, [GOOD], {"handoff_id": 5}, None):
        assert read_ticket(params).handoff_id == ""


def test_what_asks_for_a_ticket() -> None:
    flags = {"do_remote_decode": True, "do_remote_prefill": False}
    assert ticket_request(2) == {**flags, "readers": 2}
    assert ticket_request(1, "a" * 32) == {**flags, "readers": 1, "handoff_id": "a" * 32}


@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)), json_values, max_size=3),
    st.sets(st.sampled_from(sorted(GOOD)), max_size=1),
)
def test_good_ticket_with_changes_reads_back_or_is_refused(
    changes: dict[str, Any], removed: set[str]
) -> None:
    params = {name: value for name, value in {**GOOD, **changes}.items() if name not in removed}
    blamed = {*changes, *removed}
    if blamed & {"num_tokens", "block_size"}:
        blamed.add("remote_block_ids")

    result = outcome(params)

    if isinstance(result, ProtocolError):
        assert any(name in result.message for name in blamed)
    else:
        # What was let through means what it said, and can be sent on.
        written = json.loads(json.dumps(result.to_params(), allow_nan=False))
        assert {name: written[name] for name in REQUIRED} == {
            name: params[name] for name in REQUIRED
        }


# ---- prompt hash ---------------------------------------------------------------------------------

CAT, DOG = Medium("cat", 0, 1), Medium("dog", 1, 2)
PROMPT: dict[str, Any] = {
    "token_ids": [1, 2, 3],
    "media": [CAT, DOG],
    "adapter": "pirate",
    "cache_salt": "blue",
}
# Every pair of these differs, many only in where one part ends and the next begins.
PROMPTS: list[dict[str, Any]] = [
    PROMPT,
    {**PROMPT, "token_ids": []},
    {**PROMPT, "token_ids": [1, 2]},
    {**PROMPT, "token_ids": [1, 2, 4]},
    {**PROMPT, "token_ids": [2, 1, 3]},
    {**PROMPT, "token_ids": [1, 2, 3, 0]},
    {**PROMPT, "token_ids": [0, 1, 2, 3]},
    {**PROMPT, "token_ids": [1, 2 + (1 << 32), 3]},
    {**PROMPT, "token_ids": [1, 2, -3]},
    {**PROMPT, "media": []},
    {**PROMPT, "media": [CAT]},
    {**PROMPT, "media": [DOG, CAT]},
    {**PROMPT, "media": [CAT, DOG._replace(first_token=2)]},
    {**PROMPT, "media": [CAT, DOG._replace(num_tokens=1)]},
    {**PROMPT, "media": [CAT._replace(num_tokens=0), DOG._replace(first_token=0)]},
    {**PROMPT, "media": [Medium("catdog", 0, 1)]},
    {**PROMPT, "media": [CAT._replace(identifier="catd"), DOG._replace(identifier="og")]},
    {**PROMPT, "media": [CAT, DOG, Medium("", 2, 3)]},
    {**PROMPT, "media": [CAT, DOG, Medium("pirate", 2, 3)]},
    {**PROMPT, "token_ids": [1, 2, 3, 2, 0, 1], "media": []},
    {**PROMPT, "adapter": ""},
    {**PROMPT, "adapter": "pirat"},
    {**PROMPT, "adapter": "Pirate"},
    {**PROMPT, "adapter": "pirate\0blue", "cache_salt": ""},
    {**PROMPT, "cache_salt": ""},
    {**PROMPT, "cache_salt": "blue "},
    {**PROMPT, "adapter": "blue", "cache_salt": "pirate"},
    {**PROMPT, "adapter": "pirateblue", "cache_salt": ""},
    {**PROMPT, "media": [CAT, DOG, Medium("pirate", 2, 3), Medium("blue", 3, 4)]},
    {
        "token_ids": [1, 2, 3],
        "media": [CAT, DOG, Medium("pirate", 2, 3), Medium("blue", 3, 4)],
        "adapter": "",
        "cache_salt": "",
    },
]


def test_prompt_hash_tells_all_of_these_apart() -> None:
    assert len({prompt_hash(**prompt) for prompt in PROMPTS}) == len(PROMPTS)


prompts = st.fixed_dictionaries(
    {
        "token_ids": st.lists(st.integers(0, 3) | st.integers(-(1 << 63), (1 << 63) - 1)),
        "media": st.lists(
            st.builds(
                Medium, st.sampled_from(["", "a", "aa", "\0"]), st.integers(0, 3), st.integers(0, 3)
            )
        ),
        "adapter": st.sampled_from(["", "a", "aa", "\0salt"]),
        "cache_salt": st.sampled_from(["", "a", "aa", "\0lora"]),
    }
)


@given(prompts, prompts)
def test_prompt_hash_is_equal_exactly_for_equal_prompts(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert (prompt_hash(**one) == prompt_hash(**other)) == (one == other)


@given(prompts)
def test_prompt_hash_fits_the_ticket(prompt: dict[str, Any]) -> None:
    ticket = dataclasses.replace(TICKET, prompt_hash=prompt_hash(**prompt))

    assert Ticket.from_params(ticket.to_params()) == ticket


def test_what_is_logged_of_a_ticket_is_not_its_secret() -> None:
    proof = Credentials("h", "i", 1, TICKET.secret, "reader")
    offer = Offer("h", 1, TICKET.secret, empty_spans(), readers=1, ttl_s=1.0)
    for shown in (TICKET, proof, offer):
        assert TICKET.secret not in repr(shown)


def test_prompt_hash_does_not_change_between_versions() -> None:
    # Prefill and decode compute it apart, perhaps in different releases during an upgrade.
    digest = "9af000d5895922375447cdcae50987f707488bb5b8793ebedb32599a6770795b"

    assert prompt_hash(**PROMPT) == digest
    assert prompt_hash(**{**PROMPT, "token_ids": (1, 2, 3)}) == digest


def test_prompt_hash_takes_any_text_that_python_can_hold() -> None:
    # json.loads lets lone surrogates through, and the salt comes from clients.
    assert prompt_hash([1], cache_salt="\ud800") != prompt_hash([1], cache_salt="\ud801")
