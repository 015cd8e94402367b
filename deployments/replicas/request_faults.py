"""Requests that turn out to be wrong only where they are rendered, and vLLM's answer to them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from deployments.ray_internals.models import ErrorInfo, ErrorResponse
from deployments.streams.answer import Refusal


def refusal(error: Exception) -> ErrorResponse | None:
    """The refusal that a plain vLLM server answers with when its serving code raises ``error``.

    None if the request is not at fault, as when the engine died.
    """
    answer = create_error_response(error).error
    return ErrorResponse(error=ErrorInfo(**answer.model_dump())) if answer.code < 500 else None


def as_refusal(response: Any) -> Refusal:
    """The same refusal, as it goes to the router.

    Args:
        response: Ray's ``ErrorResponse`` or vLLM's.
    """
    error = response.error
    return Refusal(error.message, error.type, error.param, int(error.code or 400))


async def refusing(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """``outputs``; an exception before the first one that is the request's fault is its refusal.

    Ray's engine does this for some types of exceptions, and vLLM's own server for more.
    """
    begun = False
    async with aclosing(outputs):
        try:
            async for output in outputs:
                begun = True
                yield output
        except Exception as error:
            refused = None if begun else refusal(error)
            if refused is None:
                raise
            yield refused
