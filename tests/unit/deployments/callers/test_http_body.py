"""Requests as JSON over HTTP."""

from __future__ import annotations

from deployments.callers.http_body import JsonBody
from deployments.streams.generation import GenerationRequest


def test_a_clients_key_is_in_no_repr() -> None:
    body = JsonBody({"prompt": "Hi"}, {"Authorization": "Bearer the-only-key"})

    for told in (repr(body), repr(GenerationRequest("completions", body).named("r"))):
        assert "the-only-key" not in told
        assert "Hi" in told
