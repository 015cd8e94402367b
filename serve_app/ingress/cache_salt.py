"""Keeps what clients of one key have asked out of what clients of another can measure.

Engines keep the KV of prompts and answer sooner when one begins alike, whoever sent it. They look
for it under a hash that a request's ``cache_salt`` goes into. Here that is made from the key that a
request came with: prefill and decode see the same, and clients of one key go on sharing.
"""

from __future__ import annotations

import hmac
from typing import Final

_HASH: Final = "sha256"
_PURPOSE: Final = b"baton cache salt"


def salt_of_key(key: bytes) -> bytes:
    """Stands for an API key: each has another, the same in all processes and at all times.

    The key cannot be computed from it. Who has it can find out whether a guess at the key is right.
    """
    return hmac.digest(key, _PURPOSE, _HASH)


def cache_salt(salt_of_key: bytes, of_client: str | None) -> str:
    """What engines get as ``cache_salt``.

    Args:
        salt_of_key: see there.
        of_client: the request's own, which goes on keeping requests of the key apart.
    """
    return hmac.new(salt_of_key, (of_client or "").encode(), _HASH).hexdigest()
