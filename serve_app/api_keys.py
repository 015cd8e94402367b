"""The keys that clients show, read from where they are and again when a file of them changes."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from transfer.errors import ConfigurationError, Phase
from transfer.secret import SecretReference

MIN_KEY_CHARS: Final = 8
_LOOK_EVERY_S: Final = 1.0
_KEY: Final = re.compile(r"[!-~]+")
"""What can stand behind ``Bearer`` in a header and arrive as it was sent."""

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


class ApiKeys:
    """Accepted keys by reference; see :mod:`transfer.secret`. Each place holds one key a line.

    Files are looked at when a request comes, at most once a second. One that cannot be used any
    more leaves its keys as they were, an error is logged, and it is tried again at each look. Not
    for several threads at once.

    Args:
        references: where the keys are; none: anybody may ask.
        clock_s: monotonic.

    Raises:
        ConfigurationError: one is no reference.
    """

    def __init__(
        self, references: Sequence[str], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._places = [_Place(SecretReference.parse(text)) for text in references]
        self._clock_s = clock_s
        self._looked_s: float | None = None

    def __bool__(self) -> bool:
        return bool(self._places)

    def check(self) -> None:
        """Whether all keys are there and can match.

        Raises:
            ConfigurationError: names the place and what is wrong, not the key.
        """
        for place in self._places:
            place.read()

    def match(self, shown: bytes) -> bytes | None:
        """The accepted key that a client has shown, or None; takes as long for any of them."""
        now_s = self._clock_s()
        if self._looked_s is None or now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            for place in self._places:
                place.refresh()
        matches = [
            key for place in self._places for key in place.keys if hmac.compare_digest(shown, key)
        ]
        return matches[0] if matches else None


class _Place:
    """The keys of one place, and what its file looked like when they were read.

    What cannot be read is tried again each time, changed or not: what is in the way, such as too
    many open files, need not be a matter of the file. The log says it once.
    """

    def __init__(self, reference: SecretReference) -> None:
        self.keys: tuple[bytes, ...] = ()
        self._reference = reference
        self._seen: object = None
        self._fault = ""

    def refresh(self) -> None:
        state = _state(self._reference.file)
        if state == self._seen:
            return
        try:
            self.keys = self.read()
        except ConfigurationError as error:
            if error.message != self._fault:
                logger.error("router.api_keys: %s; its keys stay as they were", error.message)
            self._fault = error.message
            return
        self._seen, self._fault = state, ""

    def read(self) -> tuple[bytes, ...]:
        lines = [line for line in self._reference.read().split("\n") if line.strip()]
        if not lines:
            raise _bad(f"{self._reference} is empty")
        for number, line in enumerate(lines, 1):
            which = f"key {number} of {self._reference}" if len(lines) > 1 else self._reference
            key = line.removesuffix("\r")
            if key != key.strip():
                raise _bad(f"{which} has blanks around it, no client can send that")
            if _KEY.fullmatch(key) is None:
                raise _bad(f"{which} has blanks or characters outside ASCII: no header holds them")
            if len(key) < MIN_KEY_CHARS:
                raise _bad(f"{which} has less than {MIN_KEY_CHARS} characters")
        return tuple(line.removesuffix("\r").encode() for line in lines)


def _state(file: Path | None) -> object:
    """Differs when the file has changed; the same for what is no file."""
    if file is None:
        return "environment"
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
