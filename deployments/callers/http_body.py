"""Requests and answers of vLLM's OpenAI servers, as JSON over HTTP. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.streams.generation import Method
from deployments.streams.prompts import prompts_in, samples_of

PATHS: dict[Method, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class JsonBody:
    """A request's JSON object, its fields as attributes, as with the models that Ray parses.

    Attributes:
        fields: the object; those that are looked at here as vLLM reads them.
        headers: of the HTTP request, to be sent with it. They hold the client's key, so no repr
            has them.
    """

    fields: Mapping[str, Any]
    headers: Mapping[str, str] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None

    def model_dump_json(self, *, exclude: Collection[str]) -> str:
        """The fields but for some, as JSON."""
        return json.dumps({key: self.fields[key] for key in self.fields if key not in exclude})

    def model_copy(self, *, update: Mapping[str, Any]) -> JsonBody:
        """With other values of some fields; those that are None are left out."""
        fields = {key: value for key, value in self.fields.items() if key not in update}
        given = {key: value for key, value in update.items() if value is not None}
        return replace(self, fields={**fields, **given})


def answers(method: Method, fields: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts a request has, and how many samples each of them gets."""
    prompts = prompts_in(fields.get("prompt")) if method == "completions" else 1
    return prompts, samples_of(fields.get("n"))
