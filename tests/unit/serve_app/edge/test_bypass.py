"""What has to be computed where it is answered goes straight to decode, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from deployments.callers.http_body import JsonBody
from serve_app.edge.bypass import bypass_reason

PROMPT: dict[str, Any] = {"model": "m", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (PROMPT, None),
        (CHAT, None),
        ({**PROMPT, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({**CHAT, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({**PROMPT, "echo": True}, None),
        ({**PROMPT, "logprobs": 0}, None),
        ({**PROMPT, "echo": True, "logprobs": 0}, "echo with logprobs"),
        ({**CHAT, "echo": True}, "echo of a chat"),
        ({**CHAT, "logprobs": True, "top_logprobs": 2}, None),
        ({**PROMPT, "use_beam_search": True}, "use_beam_search"),
        ({**PROMPT, "use_beam_search": False}, None),
        ({**PROMPT, "prompt_embeds": b"x"}, "prompt_embeds"),
    ],
)
def test_why_a_request_skips_prefill(fields: dict[str, Any], reason: str | None) -> None:
    """As a body, at `baton proxy`. Alike as vLLM's model of it, at the ingress, whose defaults may
    be another reason."""
    model = ChatCompletionRequest if "messages" in fields else CompletionRequest
    assert bypass_reason(JsonBody(fields, {})) == reason
    assert (bypass_reason(model(**fields)) is None) == (reason is None)
