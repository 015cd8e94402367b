"""Whether a stream of an OpenAI server that says it is done really ended. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deployments.errors import AnswerUnreadable
from deployments.streams.framing import ERROR_START, content_of, each

# Within a text these quotes would have a backslash before them.
_TELLS = re.compile(rf'"finish_reason":\s*"|^{re.escape(ERROR_START)}', re.MULTILINE)


class StreamEnd:
    """Looks for the end of every choice.

    A stream that breaks off in its server may still be closed in good order: vLLM sends
    its last event and nothing else where KV failed to load and ``kv_load_failure_policy`` is
    ``fail``, its default.

    Args:
        choices: how many answers the stream carries.
    """

    def __init__(self, choices: int) -> None:
        self._left = choices
        self._ended: set[Any] = set()
        self._failed = False

    def take(self, events: str) -> None:
        """Takes whole events, framed. Parses none but those that tell of an end."""
        if not _TELLS.search(events):
            return
        for event in each(events):
            if _TELLS.search(event):
                self._take_end(event)

    @property
    def sound(self) -> bool:
        """Whether every choice has a ``finish_reason``, or the stream told of an error itself."""
        return self._failed or len(self._ended) >= self._left

    def _take_end(self, event: str) -> None:
        try:
            content = content_of(event)
        except AnswerUnreadable:
            return
        if content is None:
            return
        self._failed = self._failed or "error" in content
        choices = content.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping) and choice.get("finish_reason"):
                self._ended.add(str(choice.get("index", 0)))
