"""Word to owners whose answer nobody waits for: releases and renewals."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transfer.engine.reading.owner_links import Link
from transfer.types import Credentials

logger = logging.getLogger(__name__)

_RENEWALS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Notice:
    """A message to an owner whose answer nobody waits for.

    Attributes:
        what: for the log.
        credentials: of one start of the owner; the first that it knows is greeted with.
        send: sends it over a link, with a time limit in seconds.
        expires_at: monotonic time after which it is of no use.
    """

    what: str
    credentials: Sequence[Credentials]
    send: Callable[[Link, float], None]
    expires_at: float


def release_notice(credentials: Credentials, *, used: bool, ttl_s: float) -> Notice:
    """That a reader is done with a hand-off, or will not read it.

    Args:
        ttl_s: how long hand-offs live.
    """
    return Notice(
        what=f"release of {credentials.handoff_id}",
        credentials=[credentials],
        send=functools.partial(_release, credentials, used),
        expires_at=time.monotonic() + ttl_s,
    )


def renewal_notices(credentials: Sequence[Credentials], ttl_s: float) -> Iterator[Notice]:
    """That hand-offs of one owner are still wanted; one for each of its starts, or several."""
    by_start = sorted(credentials, key=lambda one: one.incarnation)
    for _, same in itertools.groupby(by_start, key=lambda one: one.incarnation):
        of_one_start = list(same)
        for at in range(0, len(of_one_start), _RENEWALS_AT_ONCE):
            batch = of_one_start[at : at + _RENEWALS_AT_ONCE]
            yield Notice(
                what=f"renewal of {batch[0].handoff_id}",
                credentials=batch,
                send=functools.partial(_renew, batch),
                expires_at=time.monotonic() + ttl_s,
            )


def _release(credentials: Credentials, used: bool, link: Link, timeout_s: float) -> None:
    link.control.release(credentials, used=used, read_id="", timeout_s=timeout_s)


def _renew(credentials: Sequence[Credentials], link: Link, timeout_s: float) -> None:
    renewed = link.control.renew(credentials, timeout_s)
    for one, still_offered in zip(credentials, renewed, strict=True):
        if not still_offered:
            logger.debug("renewal of %s came too late", one.handoff_id)
