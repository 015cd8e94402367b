"""Calls vLLM's OpenAI servers over HTTP, as :mod:`deployments.replica` calls replicas of Serve."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import aiohttp

from deployments.background import Background
from deployments.errors import NoReplica, ReplicaLost
from deployments.generation import GenerationRequest, Output, PrefillAnswer
from deployments.http_body import PATHS, HttpAnswer, answers, prefill_bodies
from deployments.http_servers import HttpServers, Role
from deployments.stream_end import LAST_EVENT, StreamEnd
from deployments.ticket_notices import TicketNotices
from transfer.errors import TransferError

logger = logging.getLogger(__name__)

KEEP_TICKETS_S = 120.0
"""How long a ticket is remembered so that it can be given up; then its offer is over anyway."""

HEALTH_TIMEOUT_S = 2.0

_PASSED_ON = ("content-type", "retry-after", "www-authenticate")
_UNAVAILABLE = (502, 503, 504)
_EVENT_END = b"\n\n"


class HttpCaller:
    """Calls prefill and decode servers; a server's id is its URL.

    All calls come from one event loop. A prefill that is cancelled when its answer is already on
    the way leaves a ticket behind that only expiry ends: a closed connection brings no answer.

    Args:
        session: not closed here.
        servers: which servers there are.
        notices: how owners are told of tickets that will not be read; None: by expiry.
    """

    def __init__(
        self, session: aiohttp.ClientSession, servers: HttpServers, notices: TicketNotices | None
    ) -> None:
        self._session = session
        self._servers = servers
        self._notices = notices
        self._issued: dict[str, tuple[float, dict[str, Any]]] = {}
        self._background = Background()

    async def prefill(self, request: GenerationRequest, exclude: frozenset[str]) -> PrefillAnswer:
        """Has one prefill server compute the prompts; see :class:`deployments.handoff.Caller`."""
        url = self._pick("prefill", exclude)
        with self._servers.calling(url):
            calls = [
                asyncio.ensure_future(self._prefill_one(url, request, fields))
                for fields in prefill_bodies(request.method, request.body.fields)
            ]
            complete = False
            try:
                answers = await asyncio.gather(*calls)
                refusal = next((item for item in answers if isinstance(item, HttpAnswer)), None)
                complete = refusal is None
            finally:
                if not complete:
                    self._background.start(self._give_up(url, calls))
        return PrefillAnswer(
            url, tuple(item for item in answers if isinstance(item, dict)), refusal
        )

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str]
    ) -> AsyncGenerator[Output, None]:
        """Streams a decode server's answer; see :class:`deployments.handoff.Caller`."""
        url = self._pick("decode", exclude)
        body = request.body
        with self._servers.calling(url):
            try:
                async with self._session.post(
                    url + PATHS[request.method], json=body.fields, headers=body.headers
                ) as response:
                    if response.status in _UNAVAILABLE or (
                        response.status == 500 and not await self._healthy(url)
                    ):
                        raise ReplicaLost("decode", url, f"it answered {response.status}")
                    if response.content_type != "text/event-stream":
                        answer = await _whole(response)
                        if not answer.content:
                            raise ReplicaLost("decode", url, "its answer was empty")
                        yield Output(answer, url, refused=answer.status != 200)
                        return
                    ended = False
                    end = StreamEnd(answers(body.fields))
                    async for events in _events(response.content):
                        end.take(events)
                        ended = events.endswith(LAST_EVENT)
                        if ended and not end.sound:
                            raise ReplicaLost("decode", url, "its stream ended without a reason")
                        yield Output(events, url)
                    if not ended:
                        raise ReplicaLost("decode", url, "its stream broke off")
            except (aiohttp.ClientError, TimeoutError) as error:
                raise _lost("decode", url, error) from error

    async def abort(self, replica_id: str, handoff_ids: tuple[str, ...]) -> int:
        """Tells the owner of these hand-offs that they will not be read.

        Raises:
            ReplicaLost: it could not be told; the offers expire.
        """
        known = [self._issued.pop(handoff_id, None) for handoff_id in handoff_ids]
        tickets = [entry[1] for entry in known if entry is not None]
        if self._notices is None:
            raise ReplicaLost("prefill", replica_id, "without etcd, only expiry frees its blocks")
        for ticket in tickets:
            try:
                await asyncio.to_thread(self._notices.abort, ticket)
            except TransferError as error:
                raise ReplicaLost("prefill", replica_id, str(error)) from error
        return len(tickets)

    async def drain(self) -> None:
        """Waits until all notices are through."""
        await self._background.drain()

    # ------------------------------------------------------------------------------------------

    def _pick(self, role: Role, exclude: frozenset[str]) -> str:
        url = self._servers.pick(role, exclude)
        if url is None:
            raise NoReplica(role, 0.0)
        return url

    async def _healthy(self, url: str) -> bool:
        """Whether a server that answered 500 has a fault in one request, or in its engine."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                async with self._session.get(f"{url}/health") as response:
                    return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _prefill_one(
        self, url: str, request: GenerationRequest, fields: dict[str, Any]
    ) -> dict[str, Any] | HttpAnswer | None:
        """The ticket, the refusal, or None if the server made no ticket."""
        try:
            async with self._session.post(
                url + PATHS[request.method], json=fields, headers=request.body.headers
            ) as response:
                answer = await _whole(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _lost("prefill", url, error) from error
        if answer.status >= 500:
            raise ReplicaLost("prefill", url, f"it answered {answer.status}")
        if answer.status != 200:
            return answer
        try:
            ticket = json.loads(answer.content).get("kv_transfer_params")
        except (ValueError, AttributeError) as error:
            raise ReplicaLost("prefill", url, "its answer is no JSON object") from error
        if not isinstance(ticket, dict) or not isinstance(ticket.get("handoff_id"), str):
            logger.warning("%s answered without a ticket; decode computes the prompt", url)
            return None
        self._remember(ticket)
        return ticket

    def _remember(self, ticket: dict[str, Any]) -> None:
        now = time.monotonic()
        while self._issued:
            oldest = next(iter(self._issued))
            if self._issued[oldest][0] > now - KEEP_TICKETS_S:
                break
            del self._issued[oldest]
        self._issued[ticket["handoff_id"]] = (now, ticket)

    async def _give_up(
        self, url: str, calls: Sequence[asyncio.Future[dict[str, Any] | HttpAnswer | None]]
    ) -> None:
        for call in calls:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        offered = tuple(item["handoff_id"] for item in results if isinstance(item, dict))
        if offered:
            await self.abort(url, offered)


async def _whole(response: aiohttp.ClientResponse) -> HttpAnswer:
    headers = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
    return HttpAnswer(response.status, headers, await response.read())


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """Whole server-sent events, as many as have come."""
    rest = b""
    async for piece in content.iter_any():
        whole, end, rest = (rest + piece).rpartition(_EVENT_END)
        if end:
            yield (whole + end).decode()


def _lost(role: Role, url: str, error: Exception) -> ReplicaLost:
    return ReplicaLost(role, url, str(error) or type(error).__name__)
