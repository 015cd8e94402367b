"""The engine inside a replica."""

from __future__ import annotations

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

__all__ = ["VLLMEngine"]
