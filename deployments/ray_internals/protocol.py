"""What Ray's ingress tells a replica of a request beside its body."""

from __future__ import annotations

from ray.llm._internal.serve.core.protocol import RawRequestInfo

__all__ = ["RawRequestInfo"]
