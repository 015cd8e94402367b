"""A long search with atheris for bytes that break a decoder: ``make fuzz``.

The first byte of an input chooses the decoder. A find leaves its input in a file of the working
folder; give the name of that file instead of the corpus to see it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["transfer"]):
    from tests.fuzz.decoders import DECODERS
    from transfer.errors import ProtocolError

_DECODERS = list(DECODERS.values())


def one_input(data: bytes) -> None:
    """What atheris calls: anything but ``ProtocolError`` is a find."""
    if not data:
        return
    decoder = _DECODERS[data[0] % len(_DECODERS)]
    try:
        decoder.decode(data[1:])
    except ProtocolError:
        return


def write_examples(folder: Path) -> None:
    """The corpus to begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, decoder in enumerate(_DECODERS):
        for which, example in enumerate(decoder.examples):
            (folder / f"example-{number}-{which}").write_bytes(bytes([number]) + example)


def main() -> None:
    """``python -m tests.fuzz.wire CORPUS [libFuzzer options]``"""
    write_examples(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
