"""What Serve keeps of the request that a task serves: a context variable, and how it is read."""

from __future__ import annotations

from ray.serve.context import _get_serve_request_context, _serve_request_context

__all__ = ["_get_serve_request_context", "_serve_request_context"]
