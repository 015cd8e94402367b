"""Stands in for Serve's handle of a deployment: replicas that answer by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentBroadcastResponse

from deployments.route_hint import RouteHint

Script = Callable[..., Awaitable[Any]]
"""What a replica does when it is called: with the method's name and the arguments."""


class FakeResponse:
    """A call that a replica has; of a broadcast, too."""

    def __init__(self, answer: Awaitable[Any]) -> None:
        self._answer = asyncio.ensure_future(answer)
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer.__await__()

    async def get_async(self) -> Any:
        return await self._answer

    def cancel(self) -> None:
        self.was_cancelled = True
        self._answer.cancel()


@dataclass
class FakeHandle:
    """A deployment's handle; the first replica that a hint admits gets the call.

    Attributes:
        replicas: what each one does.
        calls: replica, method and arguments of every call.
        responses: of all calls.
        picking: what happens to every pick before it is made.
    """

    replicas: dict[str, Script] = field(default_factory=dict)
    calls: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    responses: list[FakeResponse] = field(default_factory=list)
    picking: Callable[[], None] = lambda: None
    method_name: str = ""

    def options(self, *, method_name: str, stream: bool = False) -> FakeHandle:
        return FakeHandle(self.replicas, self.calls, self.responses, self.picking, method_name)

    @asynccontextmanager
    async def choose_replica(self, hint: RouteHint) -> AsyncIterator[Any]:
        self.picking()
        admitted = [name for name in self.replicas if hint.admits(name)]
        hint.offered.update(admitted)
        if not admitted:
            await asyncio.Event().wait()
        yield SimpleNamespace(replica_id=admitted[0])

    def dispatch(self, selection: Any, hint: RouteHint, *args: Any) -> FakeResponse:
        return self._call(selection.replica_id, self.method_name, args)

    def broadcast(self, method_name: str, hint: RouteHint) -> DeploymentBroadcastResponse:
        async def sent() -> list[Any]:
            return [self._call(name, method_name, ()) for name in self.replicas]

        return DeploymentBroadcastResponse(sent(), None)

    def _call(self, name: str, method_name: str, args: tuple[Any, ...]) -> FakeResponse:
        self.calls.append((name, method_name, args))
        self.responses.append(FakeResponse(self.replicas[name](method_name, *args)))
        return self.responses[-1]


def answers(answer: Any) -> Script:
    """Answers every call alike."""

    async def script(method_name: str, *args: Any) -> Any:
        return answer

    return script


def fails(error: Exception) -> Script:
    """Raises an error; Ray brings it wrapped."""

    async def script(method_name: str, *args: Any) -> Any:
        raise RayTaskError(method_name, f"ray::{method_name}()\n  ...", error).as_instanceof_cause()

    return script


async def hangs(method_name: str, *args: Any) -> Any:
    """Answers nobody."""
    await asyncio.Event().wait()
