"""The vLLM connector. vLLM loads it by ``kv_connector_module_path: transfer.connector``."""

from transfer.connector.connector import BatonConnector

__all__ = ["BatonConnector"]
