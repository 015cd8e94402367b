"""Origins of pages in browsers. Pure."""

from __future__ import annotations

import re
from typing import Final

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@?#]+")


def require_origin(text: str) -> None:
    """Checks an allowed origin; ``*`` is all of them.

    Raises:
        ValueError: it is neither.
    """
    if text != "*" and not _ORIGIN.fullmatch(text):
        raise ValueError(
            f"{text!r} is not an origin as browsers send it, without a path, like "
            "https://chat.example.com or http://localhost:3000; nor `*`"
        )
