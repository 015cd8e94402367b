"""Errors as the last event of a stream, in the form of OpenAI's streaming errors. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from deployments.streams.framing import DONE, error_event
from deployments.streams.generation import WholeAnswer

ENDS_ENGINES = WholeAnswer(
    json.dumps(
        {
            "error": {
                "message": "engines ended while they worked on this request; it is not tried again",
                "type": "server_error",
                "param": None,
                "code": 500,
            }
        }
    ).encode(),
    500,
)
"""What a condemned request is answered with; see :mod:`deployments.router.suspects`."""


def stream_error(error: Any) -> str:
    """The end of a stream that cannot go on.

    Args:
        error: why: a replica's refusal, an exception, or None if the replica was lost.
    """
    if error is ENDS_ENGINES:
        return refused_stream(error)
    message = "the decode replica was lost while it answered"
    if error is not None:
        message = f"{message}, and no other one could go on: {_refusal(error)['message']}"
    return _last_event({"message": message, "type": "server_error", "param": None, "code": 503})


def refused_stream(refusal: Any) -> str:
    """The end of a stream of several prompts of which one is refused: with what was said of it."""
    return _last_event(_refusal(refusal))


def _last_event(error: Mapping[str, Any]) -> str:
    return error_event({"error": error}) + DONE


def _refusal(error: Any) -> dict[str, Any]:
    """The error in a refusal, whatever says it."""
    if isinstance(error, WholeAnswer):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            return dict(json.loads(error.content)["error"])
        error = error.content.decode(errors="replace")
    elif (info := getattr(error, "error", None)) is not None:
        return dict(info.model_dump())
    return {"message": str(error), "type": "server_error", "param": None, "code": 503}
