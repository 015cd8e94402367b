"""Who is let in: bounds on what waits in one router. Pure; the time comes in with each call.

A request that would wait too long for prefill is refused before anybody works on it. How long it
would wait is estimated from what the requests ahead of it will cost, and that from what requests
cost before: a fixed part and a part for each prompt token, fitted to the prefills of the last
minutes. Nothing is refused for its own length, only for the queue before it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.errors import Overloaded

_FORGET = 0.98
"""Weight of an observation relative to the next: the last 50 or so count."""

_REPLICA_SEEN_S = 60.0
"""How long a prefill replica that answered counts as being there."""

_NO_SPREAD = 0.1
"""Below this relative spread of lengths, time cannot be told apart by length."""


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """Bounds of one router.

    Attributes:
        max_requests: requests between entry and their answer's end.
        max_prefill_wait_s: a request that would wait longer for prefill is refused.
    """

    max_requests: int = 1024
    max_prefill_wait_s: float = 60.0


UNBOUNDED = AdmissionPolicy(max_requests=sys.maxsize, max_prefill_wait_s=math.inf)
"""Lets everybody in."""


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What can be seen of a prompt's length without a tokenizer.

    Attributes:
        characters: of text.
        tokens: given as token ids.
    """

    characters: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, body: Any) -> PromptSize:
        """The size of a request's prompt: of ``prompt``, or of ``messages`` and ``tools``."""
        parts = [getattr(body, name, None) for name in ("prompt", "messages", "tools")]
        return cls(sum(map(_characters, parts)), _token_ids(parts[0]))


class PrefillCost:
    """Seconds of a prefill replica's time that a prompt takes: ``fixed + per_token * tokens``.

    Least squares over past prefills, older ones counting less. While all had about the same length,
    the whole time is put down as fixed, which errs towards letting longer ones in.
    """

    def __init__(self) -> None:
        self._weight = self._n = self._nn = self._t = self._nt = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Takes an observation."""
        self._weight = self._weight * _FORGET + 1.0
        self._n = self._n * _FORGET + tokens
        self._nn = self._nn * _FORGET + tokens * tokens
        self._t = self._t * _FORGET + seconds
        self._nt = self._nt * _FORGET + tokens * seconds

    def seconds(self, tokens: float) -> float:
        """What a prompt of this length will take; 0 before the first observation."""
        if not self._weight:
            return 0.0
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        per_token = 0.0
        if variance > (_NO_SPREAD * mean_n) ** 2:
            covariance = self._nt / self._weight - mean_n * mean_t
            # Neither part can be negative, however the observations scatter.
            per_token = min(max(0.0, covariance / variance), mean_t / mean_n)
        return mean_t + per_token * (tokens - mean_n)


class Admission:
    """One router's queue. Not thread-safe.

    Args:
        policy: the bounds.
    """

    def __init__(self, policy: AdmissionPolicy | None = None) -> None:
        self._policy = policy or AdmissionPolicy()
        self._cost = PrefillCost()
        self._requests = 0
        self._waiting: dict[Waiting, float] = {}
        self._characters, self._tokens = 4.0, 1.0
        self._seen: dict[str, float] = {}
        self._now = self._shared_s = 0.0

    def enter(self, now: float, *, prefill: bool = True) -> Place:
        """Lets a request in.

        Args:
            prefill: False: it goes past prefill, and only the number of requests counts.

        Raises:
            Overloaded: it has to come again later; nothing is kept of it.
        """
        if self._requests >= self._policy.max_requests:
            raise Overloaded(
                f"{self._requests} requests are being served, which is all that is allowed",
                retry_after_s=self.wait_s(now) / 2,
            )
        if prefill and (wait_s := self.wait_s(now)) > self._policy.max_prefill_wait_s:
            raise Overloaded(
                f"prefill is busy for {wait_s:.0f} s with the requests before this one, and "
                f"{self._policy.max_prefill_wait_s:.0f} s are allowed",
                retry_after_s=wait_s - self._policy.max_prefill_wait_s,
            )
        self._requests += 1
        return Place(self)

    def tokens(self, size: PromptSize) -> float:
        """How many tokens a prompt probably has, by the prompts before it."""
        return size.tokens + size.characters * self._tokens / self._characters

    def wait_s(self, now: float) -> float:
        """How long a request that came now would wait for prefill."""
        ahead = sum(self._cost.seconds(tokens) for tokens in self._waiting.values())
        return ahead / self._replicas(now)

    # ---- of Place and Waiting --------------------------------------------------------------------

    def _wait(self, size: PromptSize, now: float) -> Waiting:
        self._pass_time(now)
        waiting = Waiting(self, size, self._shared_s)
        self._waiting[waiting] = self.tokens(size)
        return waiting

    def _prefilled(self, waiting: Waiting, replica_id: str, tokens: int, now: float) -> None:
        self._pass_time(now)
        self._seen[replica_id] = now
        if self._waiting.pop(waiting, None) is None:
            return
        self._cost.add(tokens, self._shared_s - waiting.since_shared_s)
        size = waiting.size
        if size.characters and tokens > size.tokens:
            self._characters = self._characters * _FORGET + size.characters
            self._tokens = self._tokens * _FORGET + tokens - size.tokens

    def _not_prefilled(self, waiting: Waiting, now: float) -> None:
        self._pass_time(now)
        self._waiting.pop(waiting, None)

    def _left(self) -> None:
        self._requests -= 1

    # ----------------------------------------------------------------------------------------------

    def _replicas(self, now: float) -> int:
        self._seen = {name: at for name, at in self._seen.items() if now - at < _REPLICA_SEEN_S}
        return max(1, len(self._seen))

    def _pass_time(self, now: float) -> None:
        """Moves the clock that all waiting requests share.

        While k requests wait and r replicas work, each request gets min(k, r) / k of a replica's
        time. Whatever the order in which they are served, the shares add up to the time spent.
        """
        if self._waiting:
            share = min(len(self._waiting), self._replicas(now)) / len(self._waiting)
            self._shared_s += (now - self._now) * share
        self._now = now


class Place:
    """A request's place. Call :meth:`leave` once, whatever happened."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._here = True

    def wait(self, size: PromptSize, now: float) -> Waiting:
        """One of its prompts begins to wait for prefill."""
        return self._admission._wait(size, now)

    def leave(self) -> None:
        """Its answer has ended, in whichever way. Safe to call again."""
        if self._here:
            self._here = False
            self._admission._left()


class Waiting:
    """A prompt that waits for prefill. Call one of its methods, whatever happened."""

    def __init__(self, admission: Admission, size: PromptSize, since_shared_s: float) -> None:
        self.size = size
        self.since_shared_s = since_shared_s
        self._admission = admission

    def prefilled(self, replica_id: str, tokens: int, now: float) -> None:
        """A replica computed the prompt, which had so many tokens."""
        self._admission._prefilled(self, replica_id, tokens, now)

    def not_prefilled(self, now: float) -> None:
        """It waits no longer, or no longer undisturbed: its time says nothing. Safe to repeat."""
        self._admission._not_prefilled(self, now)


def _characters(part: Any) -> int:
    if isinstance(part, str):
        # An image is not text, and comes in one long string.
        return 0 if part.startswith("data:") else len(part)
    if isinstance(part, Mapping):
        return sum(_characters(value) for value in part.values())
    if isinstance(part, Sequence):
        return sum(_characters(item) for item in part)
    fields = getattr(part, "__dict__", None)
    return _characters(fields) if isinstance(fields, Mapping) else 0


def _token_ids(prompt: Any) -> int:
    if not isinstance(prompt, list):
        return 0
    return sum(1 if isinstance(item, int) else _token_ids(item) for item in prompt)
