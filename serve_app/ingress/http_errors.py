"""Errors as OpenAI's API gives them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMClientError, VLLMNotFoundError

from deployments.errors import Overloaded, ServiceUnavailable
from deployments.ray_internals.models import OpenAIHTTPException
from serve_app.edge.error_body import ERROR_TYPES, error_body, usual_kind
from serve_app.edge.request_edge import Fault
from serve_app.edge.validation_faults import first_fault

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


def error_response(
    status: int,
    message: str,
    *,
    kind: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error answer; see :func:`error_body`."""
    return JSONResponse(
        error_body(status, message, kind=kind, param=param), status_code=status, headers=headers
    )


def fault_response(fault: Fault) -> JSONResponse:
    """The answer to a request that is wrong: 400, naming the field."""
    return error_response(400, fault.message, param=fault.param)


def add_error_handlers(app: FastAPI) -> None:
    """Has every error that leaves ``app`` take OpenAI's form."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        faults = (
            error.errors() if isinstance(error, RequestValidationError | ValidationError) else []
        )
        return fault_response(_fault(faults))

    async def refused(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, OpenAIHTTPException):
            raise error
        status = int(error.status_code)
        return error_response(status, error.message, kind=_kind(status, error.type))

    async def rejected(request: Request, error: Exception) -> JSONResponse:
        status = 404 if isinstance(error, VLLMNotFoundError) else 400
        message = str(error.args[0]) if error.args else str(error)
        return error_response(status, message, param=getattr(error, "parameter", None))

    async def http(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        if error.status_code == 400 and error.__cause__ is not None:
            # FastAPI could not read the body, and keeps to itself why.
            return fault_response(_not_json(error.__cause__))
        return error_response(
            error.status_code,
            str(error.detail),
            headers=dict(error.headers) if error.headers else None,
        )

    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        seconds = error.retry_after_s if isinstance(error, ServiceUnavailable) else 1.0
        return error_response(503, str(error), headers={"Retry-After": str(max(1, round(seconds)))})

    async def overloaded(request: Request, error: Exception) -> JSONResponse:
        seconds = error.retry_after_s if isinstance(error, Overloaded) else 1
        return error_response(429, str(error), headers={"Retry-After": str(seconds)})

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error at %s", request.url.path, exc_info=error)
        return error_response(500, "an unexpected error occurred; the server's log has it")

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(OpenAIHTTPException, refused)
    # vLLM's request models raise these from validators, past pydantic.
    app.add_exception_handler(VLLMClientError, rejected)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ServiceUnavailable, unavailable)
    app.add_exception_handler(Overloaded, overloaded)
    app.add_exception_handler(Exception, unexpected)


def _fault(faults: Sequence[Any]) -> Fault:
    if faults and faults[0].get("type") == "json_invalid":
        return _not_json(faults[0].get("ctx", {}).get("error", ""))
    return first_fault(faults)


def _not_json(why: Any) -> Fault:
    return Fault("", f"the body is not valid JSON: {why}".rstrip(": "))


def _kind(status: int, given: str | None) -> str:
    """Ray and vLLM name some types after exception classes; OpenAI has a fixed set."""
    known = {"invalid_request_error", *ERROR_TYPES.values()}
    return given if given in known else usual_kind(status)
