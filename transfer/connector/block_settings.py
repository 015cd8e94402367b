"""What users set under ``transfer``: the transfer engine's settings, and the connector's own.

Imports no vLLM, so that settings can be checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from transfer.settings import TransferSettings, check_whole, wrong_setting


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """How KV blocks are handed over; checked when made.

    Attributes:
        digests: whether KV blocks are compared with digests that their owner made before the
            transfer; to be set on both sides.
        host_staging_bytes: host memory of each worker whose KV cache lies in device memory, for
            blocks on their way; 0 takes room for four prompts of ``max_model_len``.

    Raises:
        ConfigurationError: names the setting that is wrong, and what would be right.
    """

    digests: bool = False
    host_staging_bytes: int = 0

    def __post_init__(self) -> None:
        if type(self.digests) is not bool:
            raise wrong_setting("digests", self.digests, "true or false")
        check_whole("host_staging_bytes", self.host_staging_bytes, 0, 1 << 50)


_BLOCK_KEYS: Final = frozenset(item.name for item in fields(BlockSettings))

TRANSFER_KEYS: Final = tuple(
    sorted(_BLOCK_KEYS.union(item.name for item in fields(TransferSettings)))
)
"""All keys that there are under ``transfer``."""


def read_transfer(section: Mapping[str, Any]) -> tuple[TransferSettings, BlockSettings]:
    """Reads what is set under ``transfer``; all its keys are of :data:`TRANSFER_KEYS`.

    Raises:
        ConfigurationError: names the setting that is wrong, and what would be right.
    """
    blocks = {name: value for name, value in section.items() if name in _BLOCK_KEYS}
    engine = {name: value for name, value in section.items() if name not in _BLOCK_KEYS}
    return TransferSettings(**engine), BlockSettings(**blocks)
