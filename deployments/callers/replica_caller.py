"""The one place that calls actor handles, and the one where Ray's errors become ours."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.background import Background
from deployments.cancellation import is_cancelled
from deployments.errors import ContinuationMismatch, EngineGone, NoReplica, ReplicaLost
from deployments.ray_internals.request_context import (
    _get_serve_request_context,
    _serve_request_context,
)
from deployments.role import Role
from deployments.route_hint import RouteHint
from deployments.streams.answer import Refusal
from deployments.streams.generation import GenerationRequest, Output, PrefillAnswer
from transfer.ticket import Ticket, UnreadableTicket

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines

RETRY_PICK_S = 0.2
"""How long to wait for a replica of a role that had none a moment ago."""

WELL_TIMEOUT_S = 5.0
"""How long a replica may take to say whether it is well."""


class _Dispatched(NamedTuple):
    """A call that a replica has, or will get."""

    replica_id: str
    response: Any


class ReplicaCaller:
    """Calls prefill and decode replicas.

    A :class:`~deployments.router.replica_client.ReplicaClient`.

    Args:
        prefill: handle of the prefill deployment.
        decode: handle of the decode deployment.
        pick_timeout_s: how long to wait for a replica that can take a call.
    """

    def __init__(
        self, prefill: DeploymentHandle, decode: DeploymentHandle, *, pick_timeout_s: float
    ) -> None:
        self._handles = {"prefill": prefill, "decode": decode}
        self._pick_timeout_s = pick_timeout_s
        self._background = Background()
        self._missing: set[str] = set()

    async def prefill(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> PrefillAnswer:
        """Has one replica compute the prompt; see ``ReplicaClient``.

        Raises:
            NoReplica: none took the call in time.
            ReplicaLost: the one that took it died.
        """
        calls: list[_Dispatched] = []
        hint, handoff_id = RouteHint(exclude=exclude, only=only), uuid4().hex
        call = self._background.call(
            self._unary("prefill", "prefill", hint, request, handoff_id, calls=calls)
        )
        try:
            answer: PrefillAnswer = await asyncio.shield(call)
        except asyncio.CancelledError:
            for dispatched in calls:
                dispatched.response.cancel()
                # Its answer may be on the way already, or come before the word to cancel.
                self._take_back(dispatched.replica_id, handoff_id)
            if not calls:
                call.cancel()
            raise
        except ReplicaLost as lost:
            if isinstance(lost.__cause__, ActorUnavailableError):
                # It could not be reached, perhaps for a moment, and computes the prompt.
                self._take_back(lost.replica_id, handoff_id)
            raise
        return answer

    async def check(self, request: GenerationRequest) -> Refusal | None:
        """Why a replica would refuse a request; None if it would not.

        Raises:
            NoReplica, ReplicaLost: nobody could say.
        """
        refusal: Refusal | None
        try:
            refusal = await self._unary("prefill", "check_request", RouteHint(), request)
        except (NoReplica, ReplicaLost):
            refusal = await self._unary("decode", "check_request", RouteHint(), request)
        return refusal

    async def abort(self, replica_id: str, ticket: Ticket | UnreadableTicket) -> int:
        """Tells the very replica that holds the blocks that they will not be read.

        Raises:
            NoReplica: it is gone, and its blocks with it.
            ReplicaLost: it died on this call.
        """
        return await self._give_up(replica_id, ticket.handoff_id)

    async def ready(self, role: Role, timeout_s: float) -> str:
        """Asks one replica of ``role`` whether it can really serve; returns its id.

        Raises:
            NoReplica, ReplicaLost, TimeoutError: it cannot.
        """
        async with asyncio.timeout(timeout_s):
            return await self._well(role, RouteHint())

    async def well(self, role: Role, exclude: frozenset[str]) -> str:
        """A replica that is well; see ``ReplicaClient``."""
        return await self._well(role, RouteHint(exclude=exclude), WELL_TIMEOUT_S)

    async def replicas(self, role: Role) -> int:
        """How many replicas of a role say that they are well."""
        told = await self._answers_of_all(role, "ready", WELL_TIMEOUT_S)
        return sum(isinstance(one, str) for one in told)

    async def status(self, role: Role, timeout_s: float) -> list[dict[str, Any]]:
        """Transfer status of every worker of every replica of ``role`` that answers in time."""
        replicas = await self._answers_of_all(role, "status", timeout_s)
        return [status for told in replicas for status in told]

    async def decode(
        self, request: GenerationRequest, exclude: frozenset[str], only: str | None = None
    ) -> AsyncGenerator[Output, None]:
        """Streams one decode replica's output.

        Raises:
            NoReplica, ReplicaLost: as :meth:`prefill`; the latter also in mid-stream.
        """
        handle = self._handles["decode"].options(stream=True, method_name="decode")
        hint = RouteHint(exclude=exclude, only=only)
        async with AsyncExitStack() as stack:
            selection = await self._select(stack, "decode", handle, hint)
            response = handle.dispatch(selection, hint, request)
            finished = False
            try:
                async for output in response:
                    yield output
                finished = True
            except (RayActorError, ReplicaUnavailableError, RayTaskError) as error:
                finished = True
                raise _translated(error, "decode", selection.replica_id) from error
            finally:
                if not finished:
                    response.cancel()

    async def _well(self, role: Role, hint: RouteHint, timeout_s: float | None = None) -> str:
        """Asks one replica whether it can really serve; ``timeout_s`` without the time of the pick.

        Raises:
            NoReplica: there is none to be asked.
            ReplicaLost: it cannot, or does not answer.
        """
        handle = self._handles[role].options(method_name="ready")
        async with AsyncExitStack() as stack:
            selection = await self._select(stack, role, handle, hint)
            response = handle.dispatch(selection, hint)
            try:
                async with asyncio.timeout(timeout_s):
                    return str(await response)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayActorError, ReplicaUnavailableError, RayTaskError, TimeoutError) as error:
                response.cancel()
                cause = f"it is not well: {_first_line(_cause(error))}"
                raise ReplicaLost(role, selection.replica_id, cause, held=False) from error

    async def _answers_of_all(self, role: Role, method_name: str, timeout_s: float) -> list[Any]:
        """What the replicas of a role say, without those that fail or are not done in time."""
        until_s = time.monotonic() + timeout_s
        response = self._handles[role].broadcast(method_name, RouteHint())
        try:
            async with asyncio.timeout(timeout_s):
                # Not `results_async`, for which one silent replica is the silence of all.
                replicas = await response._fetch_replica_results_async()
        except (DeploymentUnavailableError, TimeoutError):
            return []
        asked = {asyncio.ensure_future(replica.get_async()): replica for replica in replicas}
        try:
            if asked:
                await asyncio.wait(asked, timeout=until_s - time.monotonic())
        finally:
            for answer, replica in asked.items():
                if not answer.done():
                    answer.cancel()
                    replica.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        done = [answer for answer in asked if answer.done() and not answer.cancelled()]
        return [answer.result() for answer in done if answer.exception() is None]

    def _take_back(self, replica_id: str, handoff_id: str) -> None:
        """Gives up what a prefill may leave behind whose answer nobody will get."""

        async def give_up() -> None:
            try:
                await self._give_up(replica_id, handoff_id)
            except (NoReplica, ReplicaLost) as gone:
                logger.info("hand-off %s not given up: %s", handoff_id, gone)

        self._background.start("giving up a hand-off", give_up())

    async def _give_up(self, replica_id: str, handoff_id: str) -> int:
        hint = RouteHint(only=replica_id)
        return int(await self._unary("prefill", "abort_handoffs", hint, [handoff_id]))

    async def _unary(
        self,
        role: Role,
        method_name: str,
        hint: RouteHint,
        *args: Any,
        calls: list[_Dispatched] | None = None,
    ) -> Any:
        handle = self._handles[role].options(method_name=method_name)
        async with AsyncExitStack() as stack:
            selection = await self._select(stack, role, handle, hint)
            response = handle.dispatch(selection, hint, *args)
            if calls is not None:
                calls.append(_Dispatched(selection.replica_id, response))
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayActorError, ReplicaUnavailableError, RayTaskError) as error:
                raise _translated(error, role, selection.replica_id) from error

    async def _select(
        self, stack: AsyncExitStack, role: Role, handle: DeploymentHandle, hint: RouteHint
    ) -> Any:
        # While a role is missing, only the first request pays for finding out.
        timeout_s = min(self._pick_timeout_s, RETRY_PICK_S if role in self._missing else math.inf)
        limited = replace(hint, until_s=time.monotonic() + timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                with _id_of_its_own():
                    selection = await stack.enter_async_context(handle.choose_replica(limited))
        except TimeoutError as error:
            # Where replicas are but the one that was chosen hangs, another try may find another.
            if hint.admits_all and not limited.offered:
                self._missing.add(role)
            raise NoReplica(role, timeout_s) from error
        except asyncio.CancelledError as error:
            # The router gives up a pick whose time is over, perhaps just before it is over here.
            if is_cancelled():
                raise
            raise NoReplica(role, timeout_s) from error
        except (DeploymentUnavailableError, BackPressureError) as error:
            raise NoReplica(role, 0.0) from error
        self._missing.discard(role)
        return selection


@contextmanager
def _id_of_its_own() -> Iterator[None]:
    """Lets Serve's router take the pick that is made in it for a request of its own.

    It tells picks apart by the id of the client's request. Of two with the same id (another try
    while it still works on the last one) it answers one, and works on the other for ever.
    """
    own = replace(_get_serve_request_context(), _internal_request_id=uuid4().hex)
    token = _serve_request_context.set(own)
    try:
        yield
    finally:
        _serve_request_context.reset(token)


def _translated(error: Exception, role: Role, replica_id: str) -> Exception:
    """A dead actor and a dead engine are one thing to a caller: try another replica."""
    cause = _cause(error)
    if isinstance(cause, ContinuationMismatch):
        return cause
    if isinstance(cause, EngineGone):
        return ReplicaLost(role, replica_id, _first_line(cause), held=False)
    if not isinstance(cause, EngineDeadError | RayActorError | ReplicaUnavailableError):
        return error
    return ReplicaLost(role, replica_id, _first_line(cause))


def _cause(error: Exception) -> Any:
    """What went wrong at the replica, without Ray's account of where."""
    return error.cause if isinstance(error, RayTaskError) else error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)
