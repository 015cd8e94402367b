"""The vLLM connector. vLLM loads it by ``kv_connector_module_path: transfer.connector``.

The class is imported when it is asked for, so that the parts that need no vLLM can be had without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.connector.connector import BatonConnector

__all__ = ["BatonConnector"]


def __getattr__(name: str) -> Any:
    if name == "BatonConnector":
        from transfer.connector.connector import BatonConnector

        return BatonConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
