"""The body of an error as OpenAI's API gives it. Needs neither Ray nor vLLM."""

from __future__ import annotations

from typing import Any

ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    # The server's own time limit.
    408: "server_error",
    429: "rate_limit_error",
}


def error_body(
    status: int, message: str, *, kind: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The JSON body of an error answer.

    Args:
        status: HTTP status, repeated as ``code``.
        kind: OpenAI's error type; by default the usual one for the status.
        param: the field of the request that is wrong.
    """
    return {
        "error": {
            "message": message,
            "type": kind or usual_kind(status),
            "param": param,
            "code": status,
        }
    }


def usual_kind(status: int) -> str:
    """OpenAI's type of an error with this HTTP status."""
    other = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return ERROR_TYPES.get(status, other)
