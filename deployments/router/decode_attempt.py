"""One call of a decode replica."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from deployments.errors import Condemned, ContinuationMismatch, NoReplica, ReplicaLost
from deployments.router.replica_client import ReplicaClient
from deployments.router.request_log import warn
from deployments.router.request_state import (
    CallDecode,
    ClientGone,
    DecodeEnded,
    DecodeLost,
    Event,
    FirstChunk,
    Refused,
    TicketUnread,
    Unwanted,
)
from deployments.router.risk import Risk
from deployments.router.router_event import RouterEvent
from deployments.streams.answer import Item, Refusal, WholeAnswer, is_refusal
from deployments.streams.generation import GenerationRequest, Transcript
from transfer import faults


class DecodeAttempt:
    """One call of a decode replica for one prompt.

    Args:
        client: calls replicas.
        request: without its ticket.
        step: the instruction to be carried out.
        risk: what is risked with the prompt.
        transcript: takes what comes.
        happened: told at once of what happens before the call is over.
        count: told of every :class:`RouterEvent`.

    Attributes:
        outcome: how the call ended, when :meth:`items` has come to its end.
    """

    outcome: DecodeEnded | DecodeLost | Refused | Unwanted | ClientGone

    def __init__(
        self,
        client: ReplicaClient,
        request: GenerationRequest,
        step: CallDecode,
        *,
        risk: Risk,
        transcript: Transcript,
        happened: Callable[[Event], object],
        count: Callable[[RouterEvent], None],
    ) -> None:
        # Whoever does not wait for the end is gone.
        self.outcome = ClientGone()
        self._client = client
        self._request = request
        self._exclude = step.exclude
        self._ticket = step.ticket
        self._risk = risk
        self._transcript = transcript
        self._happened = happened
        self._count = count
        self._began = 0.0
        self._outputs = 0

    async def items(self) -> AsyncGenerator[Item, None]:
        """What comes for the client. Closing it ends the work at the replica. Iterated once."""
        if self._ticket is not None:
            await faults.reach_async("router.ticket", self._ticket.engine_id)
        self._began = time.monotonic()
        try:
            only = await self._risk.replica_for("decode", self._exclude, self._lay_down)
            self._began = time.monotonic()
            request = self._request.with_ticket(self._ticket)
            async with aclosing(self._client.decode(request, self._exclude, only)) as outputs:
                async for output in outputs:
                    if output.unread:
                        self._count(RouterEvent.TICKETS_UNREAD)
                        self._happened(TicketUnread())
                        continue
                    self._outputs += 1
                    first = self._outputs == 1
                    await faults.reach_async("router.output" if first else "router.stream")
                    content = output.content
                    if first:
                        if isinstance(content, WholeAnswer | Refusal) and is_refusal(content):
                            self.outcome = Refused(content)
                            return
                        self._begun(output.replica_id)
                    self._transcript.add(output)
                    if content:
                        yield content
        except ReplicaLost as lost:
            self.outcome = self._lost(lost)
        except Condemned:
            self.outcome = self._risk.condemned()
        except ContinuationMismatch as mismatch:
            self.outcome = Refused(Refusal(str(mismatch)))
        except NoReplica as missing:
            warn(self._request, str(missing))
            self._count(RouterEvent.NO_DECODE)
            self.outcome = DecodeLost(None)
        else:
            self._risk.passed("decode")
            self.outcome = DecodeEnded()
        finally:
            self._risk.over("decode")

    # ------------------------------------------------------------------------------------------

    def _lay_down(self) -> None:
        """Leaves the ticket unread: it would not keep while the prompt waits in line."""
        self._ticket = None
        self._happened(TicketUnread())

    def _begun(self, replica_id: str) -> None:
        self._happened(FirstChunk())
        self._risk.over("decode")
        self._risk.alive(replica_id, self._began)
        if self._request.sent is not None and self._request.sent.created is not None:
            self._count(RouterEvent.STREAM_RESUMED)

    def _lost(self, lost: ReplicaLost) -> DecodeLost | Unwanted:
        self._count(RouterEvent.DECODE_LOST)
        resumable = self._transcript.sent() is not None
        other = "trying another" if not self._outputs or resumable else "in mid-stream"
        unwanted = self._risk.lost(
            "decode", lost, other, began=self._began, answering=self._outputs > 0
        )
        return unwanted or DecodeLost(lost.replica_id, resumable)
