"""Which streams may go on at another decode replica, and how their events are put together. Pure.

A stream goes on by being made again: the new replica gets the request and the tokens that the
client has, computes prompt and tokens, and generates from there. Its stream begins with all the
text so far, which is left out again. Counts of tokens, the reason of the end, and text that waits
for a stop string or for the rest of a character are then right without being carried over.
See docs/adr/0012-streams-go-on.md.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from deployments.errors import ContinuationMismatch
from deployments.streams.framing import DONE, content_of, framed, tells_error
from deployments.streams.generation import Method, Output, Sent

# Fields that may have any value. All others must have their default: what a new field does to a
# stream that is cut in two is not known. Left out with intent:
#   logprobs: those of the tokens sent would be needed again;
#   n, echo: more than one text, or a text that is not the answer;
#   presence_penalty, frequency_penalty, bad_words, repetition_detection: look at generated tokens,
#     and the tokens sent count as prompt in the new engine (repetition_penalty looks at both);
#   tools, response_format, structured_outputs: a grammar's or parser's state would be lost.
_ANY_VALUE = frozenset(
    {
        *("model", "prompt", "messages", "stream", "stream_options", "user", "request_id"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos"),
        *("stop", "stop_token_ids", "include_stop_str_in_output"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("logit_bias", "allowed_token_ids", "length_penalty"),
        *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval"),
        *("truncate_prompt_tokens", "truncation_side", "add_special_tokens"),
        *("add_generation_prompt", "continue_final_message", "documents", "chat_template"),
        *("chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "cache_salt"),
        *("priority", "session_id", "parallel_tool_calls"),
    }
)


def may_go_on(body: BaseModel) -> bool:
    """Whether an answer to this request can go on at another replica after a part was sent.

    If it has several prompts: each by itself.
    """
    if not getattr(body, "stream", False):
        return False
    for name, field in type(body).model_fields.items():
        if name in _ANY_VALUE:
            continue
        value = getattr(body, name)
        if value == field.get_default(call_default_factory=True):
            continue
        if name == "n" and value in (None, 1):
            continue
        if name == "seed" and body.temperature == 0:  # type: ignore[attr-defined]
            continue  # greedy: nothing is drawn
        if name == "response_format" and value.type == "text":
            continue
        return False
    return True


class StreamParts:
    """Turns one replica's events into parts of the client's stream.

    Args:
        method: ``chat`` or ``completions``.
        sent: what the client has; its text is left out.
        replica_id: whose events these are.
    """

    def __init__(self, method: Method, sent: Sent, replica_id: str) -> None:
        self._replica_id = replica_id
        self._chat = method == "chat"
        self._sent = sent
        self._known_tokens = len(sent.token_ids)
        self._known_text = sent.text
        self._resumable = True
        self._ending: list[str] | None = None

    def take(self, event: str) -> Output | None:
        """Takes an event; returns what the client gets, if anything.

        The events from ``finish_reason`` on come out as one, with :meth:`end`, so that a stream
        breaks off either before its end or not at all.

        Args:
            event: one framed server-sent event, of a request with ``return_token_ids``.

        Raises:
            ContinuationMismatch: see there.
            AnswerUnreadable: the event is not of vLLM's.
        """
        if event == DONE:
            if self._ending is None:
                return Output(event, self._replica_id)
            self._ending.append(event)
            return None
        content = None if tells_error(event) else content_of(event)
        if content is None:
            return Output(event, self._replica_id)
        if self._sent.created is not None:
            content["created"] = self._sent.created
        if "prompt_token_ids" in content:
            content["prompt_token_ids"] = None
        if not content.get("choices"):
            self._append(framed(content))
            return None
        return self._choice(content, content["choices"][0])

    def end(self) -> Output | None:
        """The last part, if the events have come to their end."""
        if self._ending is None:
            return None
        return Output("".join(self._ending), self._replica_id, resumable=self._resumable)

    # ------------------------------------------------------------------------------------------

    def _choice(self, content: dict[str, Any], choice: dict[str, Any]) -> Output | None:
        holder = choice["delta"] if self._chat else choice
        name = "content" if self._chat else "text"
        text = holder.get(name) or ""
        token_ids = choice.get("token_ids")
        opening = self._chat and "role" in holder
        more = self._chat and any(
            value is not None for key, value in holder.items() if key not in ("role", name)
        )
        if more or (text and token_ids is None):
            # Reasoning, tool calls; or text of which the tokens are not told.
            self._resumable = False
        new_ids = self._beyond_known_tokens(token_ids or [])
        new_text = self._beyond_known_text(text)
        choice["token_ids"] = None
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        if name in holder:
            holder[name] = new_text
        if choice.get("finish_reason") is not None:
            self._append(framed(content))
            return None
        # Of a stream that goes on, and of tokens that the parser keeps: nothing to be seen.
        goes_on = self._sent.created is not None
        silent = not new_text and not more and (goes_on or (not opening and name not in holder))
        return Output(
            "" if silent else framed(content),
            self._replica_id,
            token_ids=tuple(new_ids),
            text=new_text,
            created=content["created"],
            resumable=self._resumable,
        )

    def _append(self, event: str) -> None:
        if self._ending is None:
            self._ending = []
        self._ending.append(event)

    def _beyond_known_tokens(self, token_ids: list[int]) -> list[int]:
        known = min(self._known_tokens, len(token_ids))
        self._known_tokens -= known
        return token_ids[known:]

    def _beyond_known_text(self, text: str) -> str:
        known = self._known_text
        if not known or not text:
            return text
        both = min(len(known), len(text))
        if known[:both] != text[:both]:
            raise ContinuationMismatch("the continued stream does not begin with the text sent")
        self._known_text = known[both:]
        return text[both:]
