"""A request for text, and the parts of its answer, as they travel between router and replicas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from deployments.streams.answer import Complete, Item
from transfer.ticket import Ticket, UnreadableTicket

if TYPE_CHECKING:
    # Ray and vLLM stay out of a process that calls replicas otherwise than by Serve handles.
    from deployments.ray_internals.protocol import RawRequestInfo

Method = Literal["chat", "completions"]

_NAME_CHARACTERS: Final = 100


@dataclass(frozen=True, slots=True)
class Sent:
    """What the client already has of a stream.

    Attributes:
        token_ids: of the answer, in order; they cover at least ``text``.
        text: of the answer.
        created: the stream's ``created``, seconds since 1970; None before the first event.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    created: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A client's request for chat or completions.

    Attributes:
        method: which of the two.
        body: the parsed body, a pydantic model; never changed.
        http: what the replicas need to know of the HTTP request.
        sent: set if the stream may go on at another replica, then with all that the client has by
            now; None: it must not.
        client_id: what the client calls it, whatever is in it; empty: nothing. For answers, and as
            :attr:`name_in_logs`: replicas get names of Baton's own.
    """

    method: Method
    body: Any
    http: RawRequestInfo | None = None
    sent: Sent | None = None
    client_id: str = ""

    @property
    def name_in_logs(self) -> str:
        """What the client calls it, in quotes on one line and cut short; ``-``: nothing."""
        if len(self.client_id) > _NAME_CHARACTERS:
            return f"{self.client_id[:_NAME_CHARACTERS]!r}…"
        return repr(self.client_id) if self.client_id else "-"

    def named(self, request_id: str) -> GenerationRequest:
        """This request as replicas shall call it."""
        return self._with(request_id=request_id)

    def with_prompt(self, prompt: Any) -> GenerationRequest:
        """The same request for one of its prompts."""
        return self._with(prompt=prompt)

    def with_ticket(self, ticket: Ticket | None) -> GenerationRequest:
        """This request for a decode replica: the ticket in the body's ``kv_transfer_params``."""
        params = None if ticket is None else ticket.to_params()
        return self._with(kv_transfer_params=params)

    def _with(self, **fields: Any) -> GenerationRequest:
        return replace(self, body=self.body.model_copy(update=fields))


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """A prefill replica's answer.

    Attributes:
        replica_id: who holds the blocks.
        ticket: None if the prompt left none.
        error: the reason why the request was refused.
    """

    replica_id: str
    ticket: Ticket | UnreadableTicket | None = None
    error: Complete | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A part of a decode replica's answer.

    Attributes:
        content: a complete answer, or server-sent events, framed; may be empty.
        replica_id: who decodes.
        unread: nothing but this: the ticket will not be read, the prompt is computed here.
        token_ids: the tokens of the answer that came with it.
        text: the text of the answer in it.
        created: the stream's ``created``.
        resumable: after this part the stream can go on elsewhere: all tokens so far were told.
    """

    content: Item
    replica_id: str = ""
    unread: bool = False
    token_ids: tuple[int, ...] = ()
    text: str = ""
    created: int | None = None
    resumable: bool = False


class Transcript:
    """What one client has of one answer, put together from the parts.

    Args:
        sent: of :class:`GenerationRequest`; None: nobody can ever go on.
    """

    def __init__(self, sent: Sent | None) -> None:
        self._resumable = sent is not None
        self._created: int | None = None
        self._token_ids: list[int] = []
        self._texts: list[str] = []

    def add(self, output: Output) -> None:
        """Takes a part that goes to the client."""
        self._resumable = self._resumable and output.resumable
        self._created = self._created or output.created
        self._token_ids.extend(output.token_ids)
        self._texts.append(output.text)

    def sent(self) -> Sent | None:
        """What the client has; None if nobody can go on from there."""
        if not self._resumable:
            return None
        return Sent(tuple(self._token_ids), "".join(self._texts), self._created)
