"""Ray's vLLM engine, with what a hand-off needs of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse as VLLMErrorResponse
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.inputs import split_enc_dec_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from deployments.ray_internals.engine import VLLMEngine
from deployments.ray_internals.protocol import RawRequestInfo
from deployments.replicas.request_faults import as_refusal, refusal, refusing
from deployments.replicas.resumption import resuming, with_sent
from deployments.streams.answer import Refusal
from deployments.streams.generation import GenerationRequest
from transfer import faults
from transfer.ticket import Ticket, UnreadableTicket, read_ticket, ticket_request


@dataclass(frozen=True, slots=True)
class _Rendered:
    """What an engine would compute for a request: its prompts, and with which adapter."""

    serving: Any
    prompts: list[Any]
    lora_request: Any


class BatonEngine(VLLMEngine):
    """One vLLM engine of a Baton replica."""

    async def start(self) -> None:
        """Starts the engine.

        Ray 2.60 looks for vLLM's tokenization under a name that vLLM 0.29 no longer uses, and then
        says that the model cannot tokenize.
        """
        await super().start()
        if getattr(self, "_oai_serving_tokenization", None) is None:
            self._oai_serving_tokenization = getattr(self._app_state, "serving_tokenization", None)

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        """Runs the worker inside the engine process where one CPU worker is all there is.

        Ray asks for the multiprocess executor on CPU. With a single worker that costs a process,
        0.7 GiB and a hop through shared memory for every step, and gains nothing.
        """
        args, frontend, config = super()._prepare_engine_config(callback_ctx)
        on_cpu = config.device_config.device_type == "cpu"
        if on_cpu and config.parallel_config.world_size == 1:
            args.distributed_executor_backend = "uni"
            config.parallel_config.distributed_executor_backend = "uni"
        return args, frontend, config

    def _start_async_llm_engine(self, *args: Any) -> Any:
        """Starts vLLM's client, able to go on with answers that another engine began."""
        client: Any = super()._start_async_llm_engine(*args)
        client.generate = resuming(client.generate, client.get_tokenizer)
        return client

    def chat(self, *args: Any) -> AsyncGenerator[Any, None]:
        """As Ray's engine; refuses what a plain vLLM server refuses. So do those that follow."""
        return refusing(super().chat(*args))

    def completions(self, *args: Any) -> AsyncGenerator[Any, None]:
        return refusing(super().completions(*args))

    def tokenize(self, *args: Any) -> AsyncGenerator[Any, None]:
        return refusing(super().tokenize(*args))

    def detokenize(self, *args: Any) -> AsyncGenerator[Any, None]:
        return refusing(super().detokenize(*args))

    def embeddings(self, *args: Any) -> AsyncGenerator[Any, None]:
        return refusing(super().embeddings(*args))

    def score(self, *args: Any) -> AsyncGenerator[Any, None]:
        return refusing(super().score(*args))

    async def check(self, request: GenerationRequest) -> Refusal | None:
        """Why a request would be refused, whatever its number of prompts; None if it would not."""
        rendered = await self._rendered(request)
        return rendered if isinstance(rendered, Refusal) else None

    async def prefill(
        self, request: GenerationRequest, handoff_id: str
    ) -> Ticket | UnreadableTicket | Refusal | None:
        """Computes the KV of a request's prompt and pins it for a decode engine.

        The prompt is rendered by the same code that the decode side uses, then run for one token
        with sampling parameters of our own. Nothing of the client's request is clamped or
        rewritten, so nothing in it can contradict the clamp.

        Tokens that the client has already are computed with the prompt.

        Args:
            request: of one prompt.
            handoff_id: what the ticket shall be called. Cancelled, it is given up by this name,
                whether it was offered by then or not.

        Returns:
            The ticket, None if the prompt left none, or why the request is refused.
        """
        rendered = await self._rendered(request)
        if isinstance(rendered, Refusal):
            return rendered
        (prompt,) = rendered.prompts
        body = request.body
        raw_request = RawRequestInfo.to_starlette_request_optional(request.http)
        try:
            ticket = await self._prefill_one(
                with_sent(prompt, request.sent.token_ids) if request.sent else prompt,
                request_id=f"prefill-{body.request_id}",
                handoff_id=handoff_id,
                readers=body.n or 1,
                lora_request=rendered.lora_request,
                priority=rendered.serving._get_priority(body, raw_request),
            )
            await faults.reach_async("prefill.answering")
        except asyncio.CancelledError:
            await self.abort_handoffs([handoff_id])
            raise
        except Exception as error:
            if (refused := refusal(error)) is None:
                raise
            return as_refusal(refused)
        return ticket

    async def abort_handoffs(self, handoff_ids: list[str]) -> int:
        """Gives up offers of this engine; returns how many were still pinned."""
        counts = await self.collective_rpc("baton_abort", args=(handoff_ids,))
        return int(max(counts))

    async def transfer_status(self) -> list[dict[str, Any]]:
        """:meth:`WorkerControl.baton_status` of every rank."""
        statuses: list[dict[str, Any]] = await self.collective_rpc("baton_status")
        return statuses

    @property
    def is_dead(self) -> bool:
        """Whether the engine is known to have died."""
        return bool(self._engine_client.errored)

    def unfinished_requests(self) -> int:
        """Requests that the engine has not answered to the end."""
        return int(self._engine_client.get_num_unfinished_requests())

    async def _prefill_one(
        self,
        prompt: Any,
        *,
        request_id: str,
        handoff_id: str,
        readers: int,
        lora_request: Any,
        priority: int,
    ) -> Ticket | UnreadableTicket | None:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": ticket_request(readers, handoff_id)},
        )
        offered = None
        async for output in self._engine_client.generate(
            prompt, params, request_id, lora_request=lora_request, priority=priority
        ):
            offered = output.kv_transfer_params
        return None if offered is None else read_ticket(offered)

    async def _rendered(self, request: GenerationRequest) -> _Rendered | Refusal:
        """The request's prompts as the engine gets them, or why it would not take them."""
        chat, body = request.method == "chat", request.body
        serving: Any = self._oai_serving_chat if chat else self._oai_serving_completion
        if serving is None:
            return as_refusal(self._make_error("This model does not generate text."))
        try:
            rendered = await (
                serving.render_chat_request(body)
                if chat
                else serving.render_completion_request(body)
            )
            if isinstance(rendered, VLLMErrorResponse):
                return as_refusal(rendered)
            prompts = rendered[1] if chat else rendered
            self._check_inputs(serving, body, prompts)
            return _Rendered(
                serving, prompts, serving._maybe_get_adapters(body, supports_default_mm_loras=chat)
            )
        except Exception as error:
            if (refused := refusal(error)) is None:
                raise
            return as_refusal(refused)

    def _check_inputs(self, serving: Any, request: Any, inputs: list[Any]) -> None:
        """Refuses here what decode would refuse later, before prefill is spent on it."""
        processor = self._engine_client.input_processor
        wanted = getattr(request, "max_completion_tokens", None)
        for prompt in inputs:
            max_tokens = get_max_tokens(
                serving.model_config.max_model_len,
                wanted if wanted is not None else request.max_tokens,
                serving._extract_prompt_len(prompt),
                serving.default_sampling_params,
                serving.override_max_tokens,
                truncate_prompt_tokens=request.truncate_prompt_tokens,
            )
            params = request.to_sampling_params(max_tokens, serving.default_sampling_params)
            processor._validate_params(params, ("generate",))
            processor._validate_model_inputs(*split_enc_dec_input(prompt))
