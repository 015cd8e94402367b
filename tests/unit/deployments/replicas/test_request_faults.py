from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import jinja2
import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from deployments.replicas.request_faults import as_refusal, refusing


def told(*script: Any) -> list[Any]:
    """What comes of outputs that follow a script of texts and exceptions."""

    async def outputs() -> AsyncGenerator[Any, None]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    async def main() -> list[Any]:
        return [item async for item in refusing(outputs())]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        (VLLMValidationError("n must be 1", parameter="n"), 400, "n"),
        (VLLMNotFoundError("no such adapter"), 404, None),
        (TypeError("'Message' object is not subscriptable"), 400, None),
        (OverflowError("number too large"), 400, None),
        (jinja2.TemplateError("roles must alternate"), 400, None),
    ],
)
def test_what_a_plain_server_refuses_is_a_refusal(
    error: Exception, code: int, param: str | None
) -> None:
    (refused,) = told(error)

    assert isinstance(refused, ErrorResponse)
    assert refused.error.code == code
    assert refused.error.param == param
    assert str(error.args[0]) in refused.error.message
    told_on = as_refusal(refused)
    assert (told_on.code, told_on.param, told_on.message) == (code, param, refused.error.message)


@pytest.mark.parametrize("error", [EngineDeadError(), EngineGenerateError(), KeyError("bug")])
def test_what_is_not_the_requests_fault_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        told(error)


def test_after_the_first_output_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="late"):
        told("one", ValueError("late"))


def test_outputs_pass_unchanged() -> None:
    assert told("one", "two") == ["one", "two"]
