"""The two roles of replicas."""

from __future__ import annotations

from typing import Final, Literal

Role = Literal["prefill", "decode"]

ROLES: Final[tuple[Role, Role]] = ("prefill", "decode")
