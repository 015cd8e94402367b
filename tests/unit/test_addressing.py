"""Addresses parse, format and rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.addressing import Address, parse_address, usable_addresses
from transfer.errors import ProtocolError


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:80", "tcp://[::1]:65535", "rdma://node-1.x:1"])
def test_text_survives_a_round_trip(text: str) -> None:
    assert str(parse_address(text)) == text


def test_fields() -> None:
    assert parse_address("tcp://[fe80::1]:9") == Address("tcp", "fe80::1", 9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp://",
        "tcp://:80",
        "tcp://host",
        "tcp://host:",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://host:-1",
        "tcp://host:+1",
        "tcp://host:٣",
        "tcp://host:1/path",
        "tcp://user@host:1",
        "tcp://a b:1",
        "tcp://::1:80",
        "tcp://a..b:1",
        "tcp://.foo:1",
        "tcp://" + "h" * 64 + ".example:1",
        "http://host:80",
        "tcp://" + "h" * 400 + ":1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_address(text)


@given(st.text(max_size=400))
def test_no_text_gives_another_error(text: str) -> None:
    for candidate in (text, f"tcp://{text}"):
        try:
            address = parse_address(candidate)
        except ProtocolError:
            continue
        assert parse_address(str(address)) == address


def test_best_scheme_comes_first_and_unknown_ones_are_left_out() -> None:
    addresses = ["tcp://a:1", "quantum://b:2", "rdma://c:3", "tcp://d:4", "shm://e:5"]
    assert usable_addresses(addresses, {"tcp", "shm"}) == ["shm://e:5", "tcp://a:1", "tcp://d:4"]
    assert usable_addresses(addresses, {"quantum"}) == []
