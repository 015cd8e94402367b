"""The text of server-sent events as OpenAI streams them. Pure; nothing else writes or reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deployments.streams.json_object import json_object

_DATA: Final = "data: "
_END: Final = "\n\n"

DONE: Final = f"{_DATA}[DONE]{_END}"
"""The last event of every stream."""

ERROR_START: Final = f'{_DATA}{{"error"'
"""How an event begins that tells of an error."""


def framed(content: Mapping[str, Any]) -> str:
    """An event, as vLLM writes it."""
    return f"{_DATA}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}{_END}"


def error_event(body: Mapping[str, Any]) -> str:
    """An event that tells of an error.

    Args:
        body: ``{"error": ...}``, as a whole answer would have it.
    """
    return f"{_DATA}{json.dumps(body)}{_END}"


def tells_error(event: str) -> bool:
    """Whether an event tells of an error."""
    return event.startswith(ERROR_START)


def each(events: str) -> Iterator[str]:
    """Whole events, one by one, each with its end."""
    return (event + _END for event in events.split(_END) if event)


def content_of(event: str) -> dict[str, Any] | None:
    """The JSON object in an event; None: it carries no data, as a comment does.

    Raises:
        AnswerUnreadable: its data is no JSON object.
    """
    if not event.startswith(_DATA):
        return None
    return json_object(event.removeprefix(_DATA))


class WholeEvents:
    """Puts whole events together from bytes, wherever these are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, received: bytes) -> str:
        """The events that are whole with what was received now; may be none."""
        whole, end, self._rest = (self._rest + received).rpartition(_END.encode())
        return (whole + end).decode()
