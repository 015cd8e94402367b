"""Names of the headers that Serve's HTTP proxies read as text. Imports no vLLM."""

from __future__ import annotations

from ray.serve._private.constants import (
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)

__all__ = ["SERVE_HTTP_REQUEST_ID_HEADER", "SERVE_MULTIPLEXED_MODEL_ID", "SERVE_SESSION_ID"]
