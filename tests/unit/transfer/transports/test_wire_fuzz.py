"""Whatever comes off a wire: a value or a typed error, and memory in proportion to the bytes.

``make fuzz`` looks for hours where this looks for a moment.
"""

from __future__ import annotations

import contextlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS, Decoder
from transfer.errors import ProtocolError

MEMORY_PER_BYTE = 200
"""A list of small numbers in JSON takes 30 bytes in memory for each that it has on the wire."""

MEMORY_BYTES = 256 << 10

JUNK = (
    b"",
    b"\x00",
    b"\xff" * 4,
    b"[" * 2000,
    b'{"a":' * 500,
    b"9" * 5000,
    b"1e999",
    b"-1",
    b"NaN",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xed\xa0\x80",
    b'"\\ud800"',
)


def _peak_bytes(decoder: Decoder, data: bytes) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(ProtocolError):
            decoder.decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@st.composite
def changed(draw: st.DrawFn, examples: tuple[bytes, ...]) -> bytes:
    """A right message with a piece of it left out, repeated, or replaced."""
    data = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 16)))
        piece = data[begin:end]
        instead = draw(
            st.one_of(
                st.sampled_from(JUNK),
                st.binary(max_size=12),
                st.just(piece * 2),
                st.just(bytes(255 - byte for byte in piece)),
            )
        )
        data = data[:begin] + instead + data[end:]
    return data


@pytest.mark.parametrize("name", DECODERS)
def test_the_examples_are_read(name: str) -> None:
    for example in DECODERS[name].examples:
        assert DECODERS[name].decode(example) is not None


@pytest.mark.parametrize("name", DECODERS)
def test_changed_messages_give_a_value_or_a_typed_error(name: str) -> None:
    decoder = DECODERS[name]

    @given(changed(decoder.examples))
    def check(data: bytes) -> None:
        assert _peak_bytes(decoder, data) < MEMORY_BYTES + MEMORY_PER_BYTE * len(data)

    check()
