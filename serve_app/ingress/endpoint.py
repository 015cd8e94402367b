"""The HTTP side: OpenAI's routes, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from deployments.callers.replica_caller import ReplicaCaller
from deployments.errors import NoReplica, ReplicaLost
from deployments.ray_internals.ingress import (
    DEFAULT_ENDPOINTS,
    DEFAULT_LLM_ROUTER_HTTP_TIMEOUT,
    OpenAiIngress,
    SetRequestIdMiddleware,
    add_http_metrics_middleware,
    make_fastapi_ingress,
    metrics_lifespan,
    router_request_timeout,
)
from deployments.ray_internals.models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
)
from deployments.ray_internals.protocol import RawRequestInfo
from deployments.replicas.request_faults import as_refusal
from deployments.role import ROLES, Role
from deployments.router.admission import Admission, AdmissionPolicy
from deployments.router.coordinator import Coordinator
from deployments.router.request_state import RetryPolicy
from deployments.router.router_event import RouterEvent
from deployments.streams.answer import Refusal, WholeAnswer
from deployments.streams.continuation import may_go_on
from deployments.streams.event_stream import EventStream
from deployments.streams.generation import GenerationRequest, Method, Sent
from deployments.streams.prompts import prompts_in
from serve_app.api_keys import ApiKeys
from serve_app.edge.body_limits import BodyLimits
from serve_app.edge.bypass import bypass_reason
from serve_app.edge.cross_origin import cross_origin
from serve_app.edge.request_edge import Fault, answers_fault, copies_fault, header_fault
from serve_app.edge.sse import as_events
from serve_app.ingress import request_models
from serve_app.ingress.cache_salt import cache_salt
from serve_app.ingress.guard import Guard
from serve_app.ingress.http_errors import add_error_handlers, error_response, fault_response
from serve_app.ingress.metrics import SCRAPE_KEPT_S, scrape
from serve_app.ingress.prompt_logprobs import prompt_logprobs
from serve_app.ingress.shared import Shared

Body: TypeAlias = ChatCompletionRequest | CompletionRequest


class Ingress(OpenAiIngress):
    """OpenAI's API over one prefill and one decode deployment.

    Chat and completions go through the hand-off; tokenize, detokenize, embeddings and score go to
    decode replicas as Ray sends them.

    Args:
        prefill: handle of the prefill deployment.
        decode: handle of the decode deployment.
        model_cards: what ``/v1/models`` says: of the model, then of its LoRA adapters.
        policy: retry budget of a request.
        admission: bounds of what is let in.
        max_prompts: prompts times samples in one request.
        prompts_at_once: of one request, how many are under way at the same time.
        max_body_bytes: of one body; of what several prompts carry along together, too.
        max_prompt_logprobs: log-probabilities of prompts in one answer, as
            :func:`~serve_app.ingress.prompt_logprobs.prompt_logprobs` counts them.
        max_tokenize_length: characters to be tokenized, or tokens to be detokenized, in a request.
        pick_timeout_s: how long a request waits for a replica that can take it.
        health_timeout_s: how long ``/health`` waits for the answer of a role.
        api_keys: those that the app asks for.
        cache_salt_by_key: clients of different keys share no KV; goes with ``api_keys``.

    Raises:
        ConfigurationError: a key is not there or can never match, on this machine.
    """

    def __init__(
        self,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
        *,
        model_cards: Sequence[ModelCard],
        policy: RetryPolicy,
        admission: AdmissionPolicy,
        max_prompts: int,
        prompts_at_once: int,
        max_body_bytes: int,
        max_prompt_logprobs: int,
        max_tokenize_length: int,
        pick_timeout_s: float,
        health_timeout_s: float,
        api_keys: ApiKeys,
        cache_salt_by_key: bool,
    ) -> None:
        api_keys.check()
        super().__init__(
            {card.id: decode for card in model_cards}, {card.id: card for card in model_cards}
        )
        self._decode = decode
        self._decode_streaming: DeploymentHandle | None = None
        self._caller = ReplicaCaller(prefill, decode, pick_timeout_s=pick_timeout_s)
        self._coordinator = Coordinator(
            self._caller, policy, Admission(admission), _count, prompts_at_once=prompts_at_once
        )
        self._max_prompts = max_prompts
        self._max_body_bytes = max_body_bytes
        self._max_prompt_logprobs = max_prompt_logprobs
        self._max_tokenize_length = max_tokenize_length
        self._health_timeout_s = health_timeout_s
        self._cache_salt_by_key = cache_salt_by_key
        self._scrape = Shared(scrape, keep_s=SCRAPE_KEPT_S)
        self._health = Shared(self._roles, keep_s=0.0)

    async def completions(self, body: request_models.Completion, request: Request) -> Response:
        """OpenAI's completions."""
        return await self._generate("completions", body, request)

    async def chat(self, body: request_models.Chat, request: Request) -> Response:
        """OpenAI's chat completions."""
        return await self._generate("chat", body, request)

    async def tokenize(self, body: request_models.Tokenize, request: Request) -> Response:
        """The tokens of a text."""
        if len(body.prompt) > self._max_tokenize_length:
            return self._too_long("prompt", len(body.prompt), "characters")
        return await self._ask_decode("tokenize", body, request)

    async def detokenize(self, body: request_models.Detokenize, request: Request) -> Response:
        """The text of tokens."""
        if len(body.tokens) > self._max_tokenize_length:
            return self._too_long("tokens", len(body.tokens), "tokens")
        return await self._ask_decode("detokenize", body, request)

    async def embeddings(self, body: request_models.Embedding, request: Request) -> Response:
        """OpenAI's embeddings."""
        self._salt(body, request)
        return await self._ask_decode("embeddings", body, request)

    async def score(self, body: request_models.Score, request: Request) -> Response:
        """How well texts match."""
        self._salt(body, request)
        return await self._ask_decode("score", body, request)

    async def health(self) -> Response:
        """200 only if a prefill and a decode replica can really serve, else 503 saying which."""
        roles = await self._health.get()
        healthy = all(state == "ok" for state in roles.values())
        return JSONResponse(
            {"status": "ok" if healthy else "unavailable", **roles},
            status_code=200 if healthy else 503,
        )

    async def status(self) -> Response:
        """Every replica's transfer totals since start, and what is pinned now."""
        answers = await asyncio.gather(
            *(self._caller.status(role, self._health_timeout_s) for role in ROLES)
        )
        return JSONResponse(dict(zip(ROLES, answers, strict=True)))

    async def metrics(self) -> Response:
        """Prometheus text: Baton's, vLLM's and Serve's metrics of all nodes."""
        return PlainTextResponse(
            await self._scrape.get(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    # ------------------------------------------------------------------------------------------

    async def _roles(self) -> dict[Role, str]:
        states = await asyncio.gather(*(self._ready(role) for role in ROLES))
        return dict(zip(ROLES, states, strict=True))

    async def _ready(self, role: Role) -> str:
        try:
            await self._caller.ready(role, self._health_timeout_s)
        except (NoReplica, ReplicaLost) as error:
            return str(error)
        except TimeoutError:
            return f"no {role} replica answered within {self._health_timeout_s:.0f} s"
        return "ok"

    async def _generate(self, method: Method, body: Body, request: Request) -> Response:
        if refused := self._refusal(body, request):
            return refused
        self._salt(body, request)
        reason = bypass_reason(body)
        answer = await self._coordinator.answer(
            GenerationRequest(
                method,
                body,
                RawRequestInfo.from_starlette_request(request),
                sent=Sent() if may_go_on(body) else None,
                client_id=request.state.request_id,
            ),
            bypass=reason is not None,
        )
        match answer:
            case EventStream():
                return StreamingResponse(as_events(answer), media_type="text/event-stream")
            case WholeAnswer():
                return Response(answer.content, answer.status, dict(answer.headers))
            case Refusal():
                return _refused(answer, body)

    async def _ask_decode(self, method: str, body: Any, request: Request) -> Response:
        """Has a decode replica answer, as Ray's ingress does."""
        if refused := self._unfit(body.model, request):
            return refused
        async with router_request_timeout(DEFAULT_LLM_ROUTER_HTTP_TIMEOUT):
            answers = self._get_response(body=body, call_method=method, raw_request=request)
            async with aclosing(answers):
                answer = await anext(answers)
        if isinstance(answer, ErrorResponse):
            return _refused(as_refusal(answer), body)
        return JSONResponse(answer.model_dump())

    async def _get_model_id(self, model: str | None) -> str:
        """Any name, for :meth:`_unfit` has looked at it; by default the model's own.

        Ray's ingress takes what follows a colon for an adapter that it is to load itself.
        """
        return model or next(iter(self._model_cards))

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        """Decode's, whatever the name: each of its engines has all adapters."""
        if self._decode_streaming is None:
            self._decode_streaming = self._decode.options(stream=True)
        return self._decode_streaming

    def _salt(self, body: Any, request: Request) -> None:
        if self._cache_salt_by_key:
            body.cache_salt = cache_salt(request.state.salt_of_key, body.cache_salt)

    def _too_long(self, field: str, length: int, unit: str) -> JSONResponse:
        allowed = self._max_tokenize_length
        return fault_response(Fault(field, f"it has {length} {unit}, and {allowed} are allowed"))

    def _unfit(self, model: str | None, request: Request) -> JSONResponse | None:
        """Faults of any request for an engine, but of its body."""
        if fault := header_fault(request.headers):
            return fault_response(fault)
        if model is None or model in self._model_cards:
            return None
        known = ", ".join(self._model_cards)
        return error_response(
            404, f"model: there is no model {model!r} here, only {known}", param="model"
        )

    def _refusal(self, body: Body, request: Request) -> JSONResponse | None:
        """Faults that need no engine to be seen."""
        if refused := self._unfit(body.model, request):
            return refused
        if isinstance(body, ChatCompletionRequest) and not body.messages:
            return error_response(400, "messages: at least one message is needed", param="messages")
        if (
            isinstance(body, CompletionRequest)
            and body.prompt_embeds is None
            and body.prompt in (None, "", [], [[]], [""])
        ):
            return error_response(400, "prompt: it must not be empty", param="prompt")
        prompts, samples = prompts_in(getattr(body, "prompt", None)), body.n or 1
        if fault := answers_fault(prompts, samples, self._max_prompts):
            return fault_response(fault)
        if prompts > 1 and bypass_reason(body) is None:
            rest = body.model_dump_json(exclude={"prompt"}, exclude_unset=True)
            if fault := copies_fault(prompts, len(rest.encode()), self._max_body_bytes):
                return fault_response(fault)
        field, logprobs = prompt_logprobs(body)
        if logprobs > (allowed := self._max_prompt_logprobs):
            return error_response(
                400,
                f"{field}: {logprobs} log-probabilities of the prompts (characters, or tokens if "
                "they are given, times samples, times the token's own and the best) are more than "
                f"{allowed}; ask for fewer, or send several requests",
                param=field,
            )
        return None


def ingress_app(
    *,
    limits: BodyLimits,
    api_keys: ApiKeys,
    allowed_origins: tuple[str, ...],
) -> Any:
    """The ingress class with its routes, for ``serve.deployment``.

    Args:
        limits: of bodies, for each replica.
        api_keys: accepted bearer keys; none: no key is asked for.
        allowed_origins: whose pages may call from a browser; ``*`` is all of them.
    """
    app = FastAPI(lifespan=metrics_lifespan)
    add_error_handlers(app)
    add_http_metrics_middleware(app)
    app.add_middleware(SetRequestIdMiddleware)
    app.add_middleware(Guard, api_keys=api_keys, limits=limits)
    # Outside the guard: browsers ask first whether they may send a key, and then without one; and
    # pages are shown an error only if it says that they may see it.
    app.add_middleware(cross_origin, allowed=allowed_origins)
    endpoints = {
        "health": lambda app: app.get("/health"),
        "metrics": lambda app: app.get("/metrics"),
        "status": lambda app: app.get("/baton/status"),
        **DEFAULT_ENDPOINTS,
    }
    # Forms, which nothing here has looked at; and no engine here writes down what it hears.
    del endpoints["transcriptions"]
    return make_fastapi_ingress(Ingress, endpoint_map=endpoints, app=app)


def _refused(refusal: Refusal, body: Any) -> JSONResponse:
    """An engine's refusal, as the client gets it.

    Many of vLLM's say which field is wrong only in words, of which it is the first.
    """
    first = refusal.message.partition(" ")[0].strip("`")
    param = refusal.param or (first if first in type(body).model_fields else None)
    return error_response(refusal.code, refusal.message, param=param)


_EVENTS = Counter(
    "baton_router_events",
    description="What went out of the ordinary way in the router.",
    tag_keys=("event",),
)


def _count(event: RouterEvent) -> None:
    _EVENTS.inc(tags={"event": event.value})
