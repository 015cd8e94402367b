"""Answers that are not a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer as it goes to the client.

    Attributes:
        content: JSON.
        status: of HTTP; any but 200 says that no other replica would take the request either.
    """

    content: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served, where nobody has put it into an HTTP answer yet.

    Attributes:
        message: for people.
        type: OpenAI's type of error, or vLLM's own.
        param: the field of the request that is wrong, if that is known.
        code: HTTP status.
    """

    message: str
    type: str = "server_error"
    param: str | None = None
    code: int = 503

    def error(self) -> dict[str, Any]:
        """OpenAI's ``error`` object."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


Complete: TypeAlias = WholeAnswer | Refusal

Item: TypeAlias = str | WholeAnswer | Refusal
"""What an answer consists of: framed server-sent events, or one that is complete."""


def is_refusal(item: Item) -> bool:
    """Whether it says that the request itself is at fault."""
    return isinstance(item, Refusal) or (isinstance(item, WholeAnswer) and item.status != 200)
