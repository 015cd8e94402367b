from __future__ import annotations

import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from transfer.transports.tcp.streams.span_cursor import SpanCursor
from transfer.types import SpanArray


def scattered(memory: NDArray[np.uint8], lengths: list[int]) -> SpanArray:
    """Rows of such lengths, one byte apart."""
    starts = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    rows = [
        (memory.ctypes.data + int(start), length)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def held(memory: NDArray[np.uint8], lengths: list[int]) -> bytes:
    starts = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    return b"".join(
        memory[start : start + length].tobytes()
        for start, length in zip(starts.tolist(), lengths, strict=True)
    )


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    first=st.integers(0, 400),
)
def test_goes_on_where_it_stopped(lengths: list[int], first: int) -> None:
    total = sum(lengths)
    memory = np.zeros(total + len(lengths), dtype=np.uint8)
    cursor = SpanCursor(scattered(memory, lengths))
    data = os.urandom(total)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if moved := min(first, total):
            theirs.sendall(data[:moved])
            assert cursor.receive(ours.fileno(), socket.MSG_WAITALL | socket.MSG_DONTWAIT) == moved
        assert cursor.done_bytes == moved
        theirs.sendall(data[moved:])
        while cursor.done_bytes < cursor.total_bytes:
            assert cursor.receive(ours.fileno(), socket.MSG_WAITALL)
    assert held(memory, lengths) == data


def test_a_stream_that_is_broken_is_an_error() -> None:
    memory = np.zeros(16, dtype=np.uint8)
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(BrokenPipeError):
            SpanCursor(scattered(memory, [16])).send(ours.fileno(), socket.MSG_NOSIGNAL)
        assert SpanCursor(scattered(memory, [16])).receive(ours.fileno(), 0) == 0
