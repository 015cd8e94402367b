"""Who keeps a place among an owner's connections, and who loses it."""

from __future__ import annotations

from typing import cast

import pytest

from transfer.errors import PeerUnreachable
from transfer.transports.tcp.places import Places
from transfer.transports.tcp.streams.stream import TcpStream


def stream(name: str) -> TcpStream:
    """Places never look at it."""
    return cast(TcpStream, name)


A, B, C, D = map(stream, "ABCD")


def test_the_idlest_stranger_goes_for_a_new_one() -> None:
    places = Places(proven=1, strangers=2)
    assert places.enter(A) is None
    assert places.enter(B) is None
    places.heard(A)
    assert places.enter(C) is B
    assert places.enter(D) is A


def test_strangers_never_take_the_places_of_the_proven() -> None:
    places = Places(proven=1, strangers=2)
    places.enter(A)
    places.prove(A)
    for one in (B, C, D):
        places.enter(one)
    assert repr(places) == "<Places 1 proven, 2 strangers>"
    with pytest.raises(PeerUnreachable, match="its 1 connections"):
        places.check_room()
    with pytest.raises(PeerUnreachable, match="its 1 connections"):
        places.prove(D)
    places.leave(A)
    places.check_room()
    places.prove(D)
    assert places.proven == 1


def test_who_had_to_go_proves_nothing_any_more() -> None:
    places = Places(proven=9, strangers=1)
    places.enter(A)
    assert places.enter(B) is A
    places.heard(A)
    with pytest.raises(ConnectionAbortedError):
        places.prove(A)
    places.leave(A)
    places.leave(A)
    places.prove(B)
    places.heard(B)
    assert repr(places) == "<Places 1 proven, 0 strangers>"
