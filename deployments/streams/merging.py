"""The answers to a request's prompts, put together as one vLLM server puts them together. Pure.

The rules are those of ``OpenAIServingCompletion`` in vLLM 0.29
(``vllm/entrypoints/openai/completion/serving.py``): choices are counted over all prompts, with the
samples of one prompt next to each other; tokens are summed; id and time of creation are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.errors import AnswerUnreadable
from deployments.streams.framing import DONE, content_of, each, framed
from deployments.streams.json_object import json_object

_TOTALS = ("prompt_tokens", "completion_tokens", "total_tokens")


def merged_answer(answers: Sequence[bytes]) -> bytes:
    """One completion from those of all prompts, in the prompts' order.

    Raises:
        AnswerUnreadable: one of them is no completion.
    """
    documents = [_completion(answer) for answer in answers]
    choices = [choice for document in documents for choice in document["choices"]]
    usages = [document["usage"] for document in documents if document.get("usage")]
    first = documents[0]
    merged = {
        **first,
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        # What vLLM says of cached tokens is of the last prompt.
        "usage": _summed(usages, details_of=usages[-1]) if usages else first.get("usage"),
    }
    if "metrics" in merged:
        merged["metrics"] = None  # of one stream of tokens; there are several
    return json.dumps(merged, ensure_ascii=False, separators=(",", ":")).encode()


class MergedStream:
    """One stream of completion events from those of all prompts.

    Args:
        samples: choices of each prompt.

    Attributes:
        failed: an event told of an error, which ends the stream.
    """

    def __init__(self, samples: int) -> None:
        self.failed = False
        self._samples = samples
        self._created: Any = None
        self._first: int | None = None
        self._totals: dict[int, dict[str, Any]] = {}

    def take(self, prompt: int, events: str) -> str:
        """Whole events of one prompt's stream; returns what the client gets of them.

        Args:
            prompt: its place among the prompts, from 0.

        Raises:
            AnswerUnreadable: an event is not of a completion.
        """
        return "".join(self._event(prompt, event) for event in each(events))

    def end(self) -> str:
        """What comes after the last event of all prompts."""
        if self.failed or not self._totals:
            return DONE
        first = self._first if self._first in self._totals else min(self._totals)
        usages = [self._totals[prompt]["usage"] for prompt in sorted(self._totals)]
        last = {
            **self._totals[first],
            # What vLLM says of cached tokens is of the prompt that came first.
            "usage": _summed(usages, details_of=self._totals[first]["usage"]),
        }
        last.pop("metrics", None)
        return self._framed(last) + DONE

    def _event(self, prompt: int, event: str) -> str:
        if self.failed or event == DONE:
            return ""
        content = content_of(event)
        if content is None:
            return event
        if "error" in content:
            self.failed = True
            return event
        if self._first is None:
            self._first, self._created = prompt, content.get("created")
        choices = _choices(content)
        if not choices:
            if isinstance(content.get("usage"), dict):
                self._totals[prompt] = content
            return ""
        for choice in choices:
            choice["index"] = choice.get("index", 0) + prompt * self._samples
        return self._framed(content)

    def _framed(self, content: dict[str, Any]) -> str:
        if self._created is not None:
            content["created"] = self._created
        return framed(content)


def _completion(answer: bytes) -> dict[str, Any]:
    document = json_object(answer)
    _choices(document)
    return document


def _choices(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = content.get("choices")
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise AnswerUnreadable("an answer has no list of choices")
    return choices


def _summed(usages: Sequence[Mapping[str, Any]], details_of: Mapping[str, Any]) -> dict[str, Any]:
    return {**details_of, **{name: sum(one.get(name) or 0 for one in usages) for name in _TOTALS}}
