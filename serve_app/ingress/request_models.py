"""The API's request models, with everything that is wrong with a body told in one way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.ray_internals.models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    TokenizeCompletionRequest,
)
from serve_app.edge.lax_fields import as_read
from serve_app.edge.request_edge import INT64, TOKEN_IDS, Fault, body_fault, number_fault
from serve_app.edge.validation_faults import first_fault


def _check(model: Any, body: Any, validate: Callable[[Any], Any]) -> Any:
    """Validates a body; whatever is raised on the way is the body's fault.

    Validators of the models run before types are checked, and take what a client sent for what it
    should be. So each field is checked first, by itself, which also tells whose fault it is.

    Raises:
        ValidationError: with one fault, at the field that is wrong.
    """
    if isinstance(body, bytes):  # FastAPI reads nothing that is not said to be JSON
        raise _refused(Fault("Content-Type", "the body must be sent as application/json"))
    if not isinstance(body, dict):
        raise _refused(Fault("", "the body is not a JSON object"))
    body = as_read(body)
    if fault := body_fault(body) or _tool_calls_fault(body):
        raise _refused(fault)
    for name, types in _fields(model).items():
        if name in body:
            typed = _run(partial(types.validate_python, body[name]), body, name)
            if name == "messages":
                typed = _listed(typed, body)
            if fault := _number_fault(name, typed):
                raise _refused(fault)
    valid = _run(partial(validate, body), body)
    if "messages" in type(valid).model_fields:
        valid.messages = _listed(valid.messages, body)
    return valid


def checked(model: Any) -> Any:
    """``model`` as the type of a route's body: what is wrong with it is a single fault."""
    return Annotated[model, WrapValidator(partial(_check, model))]


Completion = checked(CompletionRequest)
Chat = checked(ChatCompletionRequest)
Tokenize = checked(TokenizeCompletionRequest)
Detokenize = checked(DetokenizeRequest)
Embedding = checked(EmbeddingRequest)
Score = checked(ScoreRequest)


def _run(validation: Callable[[], Any], body: Mapping[str, Any], *where: int | str) -> Any:
    """What ``validation`` of the part of ``body`` at ``where`` returns.

    Raises:
        ValidationError: with one fault.
    """
    try:
        return validation()
    except ValidationError as error:
        faults = [{**fault, "loc": (*where, *fault["loc"])} for fault in error.errors()]
        raise _refused(first_fault(faults, body)) from error
    except Exception as error:
        # Nothing but the body goes into a validation, so nothing else can be at fault.
        param = getattr(error, "parameter", None) or ".".join(map(str, where))
        raise _refused(Fault(param, str(next(iter(error.args), "it is malformed")))) from error


def _refused(fault: Fault) -> ValidationError:
    told = PydanticCustomError("refused", "{what}", {"what": fault.what})
    return ValidationError.from_exception_data(
        "request",
        [InitErrorDetails(type=told, loc=(fault.field,) if fault.field else (), input=None)],
    )


@cache
def _fields(model: Any) -> Mapping[str, TypeAdapter[Any]]:
    """The types of a model's fields; of a union none, for which model is meant is not known."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return {}
    config = ConfigDict(arbitrary_types_allowed=True)
    return {
        name: TypeAdapter(_constrained(info), config=config)
        for name, info in model.model_fields.items()
    }


def _constrained(info: FieldInfo) -> Any:
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _number_fault(path: str, value: Any) -> Fault | None:
    """A number that the engine does not hold; all lists of numbers in the API are token ids."""
    if type(value) is int and value not in INT64:
        return number_fault(path, INT64)
    if isinstance(value, float) and not math.isfinite(value):
        return Fault(path, "it must be a finite number")
    if isinstance(value, list) and set(map(type, value)) == {int}:
        for extreme in (min(value), max(value)):
            if extreme not in TOKEN_IDS:
                return number_fault(f"{path}.{value.index(extreme)}", TOKEN_IDS)
        return None
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, list):
        inner = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = list(vars(value).items())
    faults = (_number_fault(f"{path}.{name}", item) for name, item in inner)
    return next((fault for fault in faults if fault), None)


def _tool_calls_fault(body: Mapping[str, Any]) -> Fault | None:
    """vLLM makes a list of what it takes for one before it looks at it, in messages of any role."""
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if calls is not None and not isinstance(calls, list):
            return Fault(f"messages.{number}.tool_calls", "it must be a list")
    return None


def _listed(messages: list[Any], body: Mapping[str, Any]) -> list[Any]:
    """``messages`` with lists where pydantic puts iterators, which validate when they are read.

    They cannot be pickled, and would raise wherever the messages are used.
    """

    def part(number: int, name: str, value: Any) -> Any:
        if value is None or isinstance(value, str | int | float | list | Mapping):
            return value
        return _run(partial(list, value), body, "messages", number, name)

    return [
        {name: part(number, name, value) for name, value in message.items()}
        if isinstance(message, dict)
        else message
        for number, message in enumerate(messages)
    ]
