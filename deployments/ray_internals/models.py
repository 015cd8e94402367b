"""Requests and errors of OpenAI's API as Ray's servers take and give them: vLLM's models."""

from __future__ import annotations

from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorInfo,
    ErrorResponse,
    ModelCard,
    OpenAIHTTPException,
    ScoreRequest,
    TokenizeCompletionRequest,
    to_model_metadata,
)

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "ErrorInfo",
    "ErrorResponse",
    "ModelCard",
    "OpenAIHTTPException",
    "ScoreRequest",
    "TokenizeCompletionRequest",
    "to_model_metadata",
]
