"""Calls vLLM's OpenAI servers over HTTP.

As :mod:`deployments.callers.replica_caller` calls replicas of Serve.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp

from deployments.callers.http_body import PATHS, answers
from deployments.callers.http_servers import HttpServers
from deployments.callers.prefill_body import prefill_body
from deployments.callers.ticket_notices import TicketNotices
from deployments.errors import AnswerUnreadable, NoReplica, ReplicaLost
from deployments.role import Role
from deployments.streams.answer import WholeAnswer
from deployments.streams.framing import DONE, WholeEvents
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer
from deployments.streams.json_object import json_object
from deployments.streams.stream_end import StreamEnd
from transfer.errors import TransferError
from transfer.ticket import Ticket, UnreadableTicket, read_ticket

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 2.0

_PASSED_ON = ("content-type", "retry-after", "www-authenticate")
_UNAVAILABLE = (502, 503, 504)
# Of a rendering. Other statuses say that the server has no such route, or trouble of its own.
_REFUSED = (400, 401, 403, 413, 422, 429)
# Of a body. What prefill is asked is not quite the client's, so decode decides.
_UNFIT = (400, 422)
_NO_REASON = (
    "its stream ended without a finish reason, as where KV did not load; start it with "
    "kv_load_failure_policy: recompute"
)


class HttpCaller:
    """Calls prefill and decode servers; a server's id is its URL.

    A :class:`~deployments.router.replica_client.ReplicaClient`.

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
        # Died with a call: whether another start of it is there is asked before the next one.
        self._died: set[str] = set()
        self._alive_at: dict[str, float] = {}

    async def check(self, request: GenerationRequest) -> WholeAnswer | None:
        """Why a server would refuse a request; None if it would not, or cannot say.

        Raises:
            NoReplica, ReplicaLost: nobody could be asked.
        """
        role: Role = "prefill" if self._servers.pick("prefill", ()) else "decode"
        url = self._pick(role, frozenset())
        path = PATHS[request.method] + "/render"
        try:
            async with self._session.post(
                url + path, json=request.body.fields, headers=request.body.headers
            ) as response:
                if response.status not in _REFUSED:
                    return None
                return await _whole(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ReplicaLost(role, url, _words(error), held=False) from error

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        """Has one server compute the prompt; see ``ReplicaClient``."""
        url, alive_at = await self._alive("prefill", exclude, only)
        fields = prefill_body(request.method, request.body.fields)
        with self._servers.calling(url):
            try:
                async with self._session.post(
                    url + PATHS[request.method], json=fields, headers=request.body.headers
                ) as response:
                    answer = await _whole(response)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._lost("prefill", url, alive_at, error) from error
        if answer.status >= 500:
            if answer.status == 500 and not await self._healthy(url):
                raise self._dead("prefill", url, alive_at, "it answered 500")
            raise ReplicaLost("prefill", url, f"it answered {answer.status}", held=False)
        if answer.status in _UNFIT:
            logger.info("%s answered %d; decode decides on the request", url, answer.status)
            return PrefillAnswer(url)
        if answer.status != 200:
            return PrefillAnswer(url, error=answer)
        try:
            params = json_object(answer.content).get("kv_transfer_params")
        except AnswerUnreadable as error:
            raise ReplicaLost("prefill", url, str(error), held=False) from error
        if params is None:
            logger.warning("%s answered without a ticket; decode computes the prompt", url)
            return PrefillAnswer(url)
        return PrefillAnswer(url, read_ticket(params))

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        """Streams a decode server's answer; see ``ReplicaClient``."""
        url, alive_at = await self._alive("decode", exclude, only)
        body = request.body
        with self._servers.calling(url):
            try:
                async with self._session.post(
                    url + PATHS[request.method], json=body.fields, headers=body.headers
                ) as response:
                    if response.status == 500 and not await self._healthy(url):
                        raise self._dead("decode", url, alive_at, "it answered 500")
                    if response.status in _UNAVAILABLE:
                        cause = f"it answered {response.status}"
                        raise ReplicaLost("decode", url, cause, held=False)
                    if response.content_type != "text/event-stream":
                        answer = await _whole(response)
                        if not answer.content:
                            raise ReplicaLost("decode", url, "its answer was empty", held=False)
                        yield Output(answer, url)
                        return
                    ended = False
                    end = StreamEnd(math.prod(answers(request.method, body.fields)))
                    async for events in _events(response.content):
                        end.take(events)
                        ended = events.endswith(DONE)
                        if ended and not end.sound:
                            raise ReplicaLost("decode", url, _NO_REASON, held=False)
                        yield Output(events, url)
                    if not ended:
                        raise ReplicaLost("decode", url, "its stream broke off", held=False)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._lost("decode", url, alive_at, error) from error

    async def well(self, role: Role, exclude: frozenset[str]) -> str:
        """A server whose engine is alive; see ``ReplicaClient``."""
        url = self._pick(role, exclude)
        if not await self._healthy(url):
            raise ReplicaLost(role, url, "it is not well", held=False)
        return url

    async def replicas(self, role: Role) -> int:
        """How many servers of a role say that they are well."""
        return sum(await asyncio.gather(*(self._healthy(url) for url in self._servers.urls(role))))

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        """Tells the owner of this hand-off that it will not be read.

        Raises:
            ReplicaLost: it could not be told; the offer expires.
        """
        if self._notices is None:
            raise ReplicaLost("prefill", replica_id, "without etcd, only expiry frees its blocks")
        if isinstance(ticket, UnreadableTicket):
            raise ReplicaLost("prefill", replica_id, "its secret is not known")
        try:
            await asyncio.to_thread(self._notices.abort, ticket)
        except TransferError as error:
            raise ReplicaLost("prefill", replica_id, str(error)) from error
        return 1

    # ------------------------------------------------------------------------------------------

    def _pick(self, role: Role, exclude: frozenset[str]) -> str:
        url = self._servers.pick(role, exclude)
        if url is None:
            raise NoReplica(role, 0.0)
        return url

    async def _alive(
        self, role: Role, exclude: frozenset[str], only: str | None
    ) -> tuple[str, float]:
        """The server for a call, and when it was found alive if it had died before.

        Raises:
            NoReplica: there is none.
            ReplicaLost: it is still dead; the request was not there.
        """
        url = only or self._pick(role, exclude)
        if url in self._died and not await self._healthy(url):
            raise ReplicaLost(role, url, "it is not well", held=False)
        return url, self._alive_at.get(url, -math.inf)

    async def _healthy(self, url: str) -> bool:
        """Whether a server that answered 500 has a fault in one request, or in its engine."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                async with self._session.get(f"{url}/health") as response:
                    is_well = response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
        if is_well and url in self._died:
            self._died.remove(url)
            self._alive_at[url] = asked
        return is_well

    def _lost(self, role: Role, url: str, alive_at: float, error: Exception) -> ReplicaLost:
        if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
            return ReplicaLost(role, url, _words(error), held=False)
        return self._dead(role, url, alive_at, _words(error))

    def _dead(self, role: Role, url: str, alive_at: float, cause: str) -> ReplicaLost:
        """A server that died, or its engine did, when it may have had a call."""
        self._died.add(url)
        return ReplicaLost(role, url, cause, alive_at=alive_at)


async def _whole(response: aiohttp.ClientResponse) -> WholeAnswer:
    headers = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
    return WholeAnswer(await response.read(), response.status, headers)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[str]:
    """Whole server-sent events, as many as have come."""
    whole = WholeEvents()
    async for received in content.iter_any():
        if events := whole.take(received):
            yield events


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
