"""What ``transfer.host: auto`` becomes in a worker."""

from __future__ import annotations

import pytest

from transfer.connector.settings import ConnectorSettings
from transfer.connector.working.start import _with_own_address
from transfer.errors import ConfigurationError
from transfer.settings import TransferSettings

# vLLM is imported here.
pytestmark = pytest.mark.timeout(90)


def host_in_use(host: str) -> str:
    settings = ConnectorSettings(
        discovery={"kind": "static", "peers": []}, transfer=TransferSettings(host=host)
    )
    return _with_own_address(settings).transfer.host


def test_auto_is_the_address_that_vllm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")

    assert host_in_use("auto") == "10.0.0.7"
    assert host_in_use("10.0.0.8") == "10.0.0.8"


@pytest.mark.parametrize("unknown", ["0.0.0.0", "::"])
def test_peers_are_never_told_an_address_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, unknown: str
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", unknown)

    with pytest.raises(ConfigurationError, match=f"vLLM says {unknown}; set VLLM_HOST_IP"):
        host_in_use("auto")
    assert host_in_use("127.0.0.1") == "127.0.0.1"
