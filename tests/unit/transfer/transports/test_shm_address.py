"""Addresses of shm, and the host that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import ProtocolError, TransportUnavailable
from transfer.transports.shm import address as shm_address
from transfer.transports.shm.address import Host, ShmAddress

ADDRESS = ShmAddress(Host("5a4f-7", 4026531836), 123, 0x7F00_0000_1000, bytes(range(16)))


def test_text_and_back() -> None:
    text = "shm://5a4f-7/4026531836/123/7f0000001000/000102030405060708090a0b0c0d0e0f"
    assert str(ADDRESS) == text
    assert ShmAddress.parse(text) == ADDRESS


@pytest.mark.parametrize(
    "text",
    [
        "shm://",
        "tcp://127.0.0.1:80",
        str(ADDRESS) + "0",
        str(ADDRESS)[:-1],
        str(ADDRESS).replace("/123/", "/0/"),
        str(ADDRESS).replace("/123/", "/-1/"),
        str(ADDRESS).replace("/123/", "/99999999999/"),
        str(ADDRESS).replace("7f0000001000", "7f" * 9),
        str(ADDRESS) + "\n",
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(ProtocolError):
        ShmAddress.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_typed_error(text: str) -> None:
    with pytest.raises(ProtocolError):
        ShmAddress.parse("shm://" + text)


def test_this_host_is_always_the_same() -> None:
    assert Host.of_this_process() == Host.of_this_process()


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shm_address, "_BOOT_ID", tmp_path / "missing")
    with pytest.raises(TransportUnavailable, match="missing"):
        Host.of_this_process()
