"""Errors as the last event of a stream, in the form of OpenAI's streaming errors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from deployments.errors import AnswerUnreadable
from deployments.streams.answer import Complete, Refusal
from deployments.streams.framing import DONE, error_event
from deployments.streams.json_object import json_object

ENDS_ENGINES = Refusal(
    "engines ended while they worked on this request; it is not tried again", code=500
)
"""What a condemned request is answered with; see :mod:`deployments.router.suspects`."""


def stream_error(refusal: Complete | None) -> str:
    """The end of a stream that cannot go on.

    Args:
        refusal: why it cannot; None: the replica was lost.
    """
    if refusal is ENDS_ENGINES:
        return refused_stream(ENDS_ENGINES)
    message = "the decode replica was lost while it answered"
    if refusal is not None:
        message = f"{message}, and no other one could go on: {_error(refusal)['message']}"
    return _last_event(Refusal(message).error())


def refused_stream(refusal: Complete) -> str:
    """The end of a stream of several prompts of which one is refused: with what was said of it."""
    return _last_event(_error(refusal))


def _last_event(error: Mapping[str, Any]) -> str:
    return error_event({"error": error}) + DONE


def _error(refusal: Complete) -> dict[str, Any]:
    """The error in a refusal, whatever says it."""
    if isinstance(refusal, Refusal):
        return refusal.error()
    with suppress(AnswerUnreadable, KeyError):
        error = json_object(refusal.content)["error"]
        if isinstance(error, dict) and "message" in error:
            return error
    return Refusal(refusal.content.decode(errors="replace")).error()
