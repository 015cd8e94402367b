"""Generating on from tokens that another engine made, as if this one had made them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from copy import copy
from types import SimpleNamespace
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

SENT_TOKEN_IDS = "sent_token_ids"
"""Beside the ticket in ``kv_transfer_params``: the answer's first tokens. Never from a client."""

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


def with_sent(prompt: Any, token_ids: Sequence[int]) -> Any:
    """A rendered prompt, followed by the answer's first tokens."""
    return {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *token_ids]}


def take_sent(params: SamplingParams) -> list[int]:
    """Takes the answer's first tokens out of the parameters."""
    extra = params.extra_args or {}
    transfer = extra.get("kv_transfer_params") or {}
    if SENT_TOKEN_IDS not in transfer:
        return []
    rest = {name: value for name, value in transfer.items() if name != SENT_TOKEN_IDS}
    params.extra_args = {**extra, "kv_transfer_params": rest or None}
    return list(transfer[SENT_TOKEN_IDS])


class Resumption:
    """One answer that another engine began.

    The engine computes prompt and tokens as one prompt and generates what is left of the budget,
    without text. The text is made here, from the answer's first token on: what a stop string or an
    incomplete character held back in the other engine is held back here too.

    Args:
        tokenizer: the model's.
        prompt: as rendered.
        params: the request's, as the other engine had them.
        request_id: for log lines.
        sent: the tokens that are there already.

    Raises:
        ValueError: nothing is left to generate.
    """

    def __init__(
        self, tokenizer: Any, prompt: Any, params: SamplingParams, request_id: str, sent: list[int]
    ) -> None:
        if params.max_tokens is not None and params.max_tokens <= len(sent):
            raise ValueError(f"{len(sent)} tokens were sent of {params.max_tokens}: none is left")
        self._prompt_token_ids = list(prompt["prompt_token_ids"])
        self._sent = sent
        self._begun = False
        self.prompt = with_sent(prompt, sent)
        self.params = copy(params)
        if params.max_tokens is not None:
            self.params.max_tokens = params.max_tokens - len(sent)
        self.params.min_tokens = max(0, params.min_tokens - len(sent))
        self.params.detokenize = False
        self.params.stop = []
        request: Any = SimpleNamespace(
            request_id=request_id,
            sampling_params=params,
            prompt_token_ids=self._prompt_token_ids,
            prompt_embeds=None,
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)

    def take(self, output: RequestOutput) -> RequestOutput:
        """The engine's output as it would be had the engine made the whole answer.

        The first one brings the tokens sent and their text along.
        """
        (completion,) = output.outputs
        token_ids = list(completion.token_ids)
        if not self._begun:
            if not token_ids and completion.finish_reason is None:
                return output
            self._detokenizer.update(self._sent, False)
        stop, taken = self._detokenize(token_ids, completion.finish_reason == "stop")
        completion.token_ids = (
            token_ids[:taken] if self._begun else [*self._sent, *token_ids[:taken]]
        )
        self._begun = True
        if stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", stop
            output.finished = True
        completion.text = self._detokenizer.get_next_output_text(output.finished, True)
        if output.prompt_token_ids is not None:
            output.prompt_token_ids = self._prompt_token_ids
        return output

    def _detokenize(self, token_ids: list[int], stopped: bool) -> tuple[str | None, int]:
        """The stop string that the answer has come to, and how many tokens are there by then.

        One after the other: outputs that nobody has taken are merged, and behind a stop string
        there may be tokens that the other engine would not have made.

        Args:
            stopped: whether the last one ended the answer by itself.
        """
        for number, token_id in enumerate(token_ids, 1):
            is_end = stopped and number == len(token_ids)
            if (stop := self._detokenizer.update([token_id], is_end)) is not None:
                return stop, number
        return None, len(token_ids)


def resuming(generate: Generate, tokenizer: Callable[[], Any]) -> Generate:
    """``AsyncLLM.generate``, able to go on with an answer.

    Args:
        generate: the engine's own.
        tokenizer: gives the model's tokenizer.
    """

    async def generate_on(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **more: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        sent = take_sent(sampling_params)
        if not sent:
            async with aclosing(generate(prompt, sampling_params, request_id, **more)) as outputs:
                async for output in outputs:
                    yield output
            return
        resumption = Resumption(tokenizer(), prompt, sampling_params, request_id, sent)
        started = generate(resumption.prompt, resumption.params, request_id, **more)
        async with aclosing(started) as outputs:
            async for output in outputs:
                yield resumption.take(output)
                if output.finished:
                    return

    return generate_on
