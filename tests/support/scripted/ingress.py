"""The ingress as Serve mounts it, without Serve, before replicas that answer by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    CompletionResponse,
    ModelCard,
    TokenizeResponse,
)
from ray.llm._internal.serve.core.ingress.ingress import make_fastapi_ingress

from deployments.router.admission import AdmissionPolicy
from deployments.router.request_state import RetryPolicy
from deployments.streams.answer import Complete, WholeAnswer
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer
from serve_app.api_keys import ApiKeys
from serve_app.edge.body_limits import BodyLimits
from serve_app.ingress.endpoint import Ingress, ingress_app
from tests.support.scripted.tickets import make_ticket
from transfer.ticket import Ticket, UnreadableTicket

TICKET = make_ticket()
ONE, DONE = 'data: {"text": "one"}\n\n', "data: [DONE]\n\n"
ANSWER = "answer"
"""In a script: a completion with the name by which the replica knows the request."""
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Once"}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
BEAMS: dict[str, Any] = {**COMPLETION, "use_beam_search": "true", "n": 2, "max_tokens": 3}
KV_PARAMS, CONTENT = "kv_transfer_params", "messages.0.content.0.text"
SMELL: dict[str, Any] = {"role": "user", "content": [{"type": "smell"}]}
MAX_BODY_BYTES = 16 << 10
HANG = "hang"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@dataclass
class FakeCaller:
    """Stands in for ReplicaCaller: replicas that answer by a script."""

    prefilled: PrefillAnswer = field(default_factory=lambda: PrefillAnswer("p1", TICKET))
    chunks: Sequence[Any] = ()
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    aborted: list[tuple[str, Ticket | UnreadableTicket]] = field(default_factory=list)
    not_ready: dict[str, Exception] = field(default_factory=dict)
    decoding: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def check(self, request: GenerationRequest) -> Complete | None:
        self.calls.append(("check", request.method, request.body))
        return None

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        self.calls.append(("prefill", request.method, request.body))
        return self.prefilled

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        self.calls.append(("decode", request.method, request.body))
        self.decoding += 1
        self.begun.set()
        try:
            for chunk in self.chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk == HANG:
                    await asyncio.Event().wait()
                if chunk == ANSWER:
                    chunk = _answer(request.body.request_id)
                yield Output(chunk, "d1")
        finally:
            self.decoding -= 1

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        self.aborted.append((replica_id, ticket))
        return 1

    async def ready(self, role: str, timeout_s: float) -> str:
        if role in self.not_ready:
            raise self.not_ready[role]
        return f"{role}-1"

    def roles(self) -> list[str]:
        return [role for role, _, _ in self.calls]


def _answer(request_id: str) -> WholeAnswer:
    response = CompletionResponse(
        id=f"cmpl-{request_id}",
        model="demo",
        choices=[],
        usage={"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
    )
    return WholeAnswer(response.model_dump_json().encode())


NO_KEYS = ApiKeys([])


def only_key(monkeypatch: pytest.MonkeyPatch) -> ApiKeys:
    monkeypatch.setenv("ENDPOINT_TEST_KEY", "the-only-key")
    return ApiKeys(["${ENDPOINT_TEST_KEY}"])


class Endpoint:
    """The ingress as Serve mounts it, without Serve."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        api_keys: ApiKeys = NO_KEYS,
        max_requests: int = 8,
        allowed_origins: tuple[str, ...] = ("*",),
        adapters: tuple[str, ...] = (),
        cache_salt_by_key: bool = False,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.caller = FakeCaller()
        apps: list[Any] = []

        def remember(cls: type, *, endpoint_map: Any, app: Any) -> Any:
            apps.append(app)
            return make_fastapi_ingress(cls, endpoint_map=endpoint_map, app=app)

        monkeypatch.setattr("serve_app.ingress.endpoint.make_fastapi_ingress", remember)
        monkeypatch.setattr(
            "serve_app.ingress.endpoint.ReplicaCaller", lambda *args, **kwargs: self.caller
        )
        ingress_app(
            limits=BodyLimits(max_body_bytes, max_body_bytes, timeout_s=5.0),
            api_keys=api_keys,
            allowed_origins=allowed_origins,
        )
        (self.app,) = apps
        handle: Any = SimpleNamespace(options=self._options)
        instance = Ingress(
            handle,
            handle,
            model_cards=[
                ModelCard(id=name, object="model", owned_by="baton", permission=[], metadata={})
                for name in ("demo", *adapters)
            ],
            policy=RetryPolicy(attempts=2, backoff_s=0.0),
            admission=AdmissionPolicy(max_requests=max_requests),
            max_prompts=4,
            prompts_at_once=2,
            max_body_bytes=max_body_bytes,
            max_prompt_logprobs=100,
            max_tokenize_length=100,
            pick_timeout_s=1.0,
            health_timeout_s=1.0,
            api_keys=api_keys,
            cache_salt_by_key=cache_salt_by_key,
        )
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=instance)
        )

    def _options(self, *, stream: bool) -> Any:
        """Of a replica's handle, for what goes to decode as Ray sends it."""
        return SimpleNamespace(tokenize=SimpleNamespace(remote=self._tokenize))

    async def _tokenize(self, body: Any, request: Any) -> AsyncGenerator[Any, None]:
        self.caller.calls.append(("decode", "tokenize", body))
        yield TokenizeResponse(tokens=[1], count=1, max_model_len=8)

    def ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **content)

        return asyncio.run(main())

    def refused(self, status: int, method: str, path: str, **content: Any) -> dict[str, Any]:
        """The error of a request that no replica may have seen."""
        response = self.ask(method, path, **content)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert self.caller.calls == []
        return error
