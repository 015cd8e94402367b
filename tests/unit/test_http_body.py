"""Requests as JSON over HTTP."""

from __future__ import annotations

from deployments.generation import GenerationRequest
from deployments.http_body import JsonBody


def test_a_clients_key_is_in_no_repr() -> None:
    body = JsonBody({"prompt": "Hi"}, {"Authorization": "Bearer the-only-key"})

    for told in (repr(body), repr(GenerationRequest("completions", body).named("r"))):
        assert "the-only-key" not in told
        assert "Hi" in told
