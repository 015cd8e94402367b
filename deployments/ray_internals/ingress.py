"""The ingress that ours extends, and what its HTTP application is made of."""

from __future__ import annotations

from ray.llm._internal.serve.constants import DEFAULT_LLM_ROUTER_HTTP_TIMEOUT
from ray.llm._internal.serve.core.ingress.ingress import (
    DEFAULT_ENDPOINTS,
    OpenAiIngress,
    make_fastapi_ingress,
    router_request_timeout,
)
from ray.llm._internal.serve.core.ingress.middleware import SetRequestIdMiddleware
from ray.llm._internal.serve.observability.metrics.fast_api_metrics import (
    add_http_metrics_middleware,
    metrics_lifespan,
)

__all__ = [
    "DEFAULT_ENDPOINTS",
    "DEFAULT_LLM_ROUTER_HTTP_TIMEOUT",
    "OpenAiIngress",
    "SetRequestIdMiddleware",
    "add_http_metrics_middleware",
    "make_fastapi_ingress",
    "metrics_lifespan",
    "router_request_timeout",
]
