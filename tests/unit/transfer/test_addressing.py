"""Addresses parse, format and rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.addressing import (
    Address,
    host_and_port,
    is_every_address,
    parse_address,
    usable_addresses,
)
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


@pytest.mark.parametrize(
    ("host", "every"),
    [
        *((host, True) for host in ("0.0.0.0", "0", "0.0", "0x0", "::", "0::0", "::ffff:0.0.0.0")),
        *((host, True) for host in ("0:0:0:0:0:0:0:0", "::%lo")),
        *((host, False) for host in ("127.0.0.1", "0.0.0.1", "::1", "fd00::", "::ffff:1.2.3.4")),
        *((host, False) for host in ("node-1", "0.example", "localhost", "")),
    ],
)
def test_what_stands_for_every_address_is_known_in_all_spellings(host: str, every: bool) -> None:
    assert is_every_address(host) is every


@given(st.text(max_size=40))
def test_any_text_may_be_asked_about(text: str) -> None:
    assert is_every_address(text) in (True, False)


def test_ipv6_stands_in_brackets_before_a_port() -> None:
    assert host_and_port("::1", 80) == "[::1]:80"
    assert host_and_port("10.0.0.1", 80) == "10.0.0.1:80"
    assert host_and_port("node-1", 80) == "node-1:80"
