"""``baton proxy`` and the servers that it finds through etcd, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.network.link_relays import Link, Relays
from tests.support.processes.lifeline import start_tied
from tests.support.processes.reporting_process import ROOT
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.etcd_sessions import admin, eventually
from tests.support.servers.registered_server import leave, registered_server
from tests.support.servers.vllm_server import free_port, get, post
from transfer.discovery.record import record_key
from transfer.discovery.settings import EtcdSettings
from transfer.types import PeerId

pytestmark = pytest.mark.timeout(240)

LEASE_S = EtcdSettings(endpoints=("127.0.0.1:2379",)).lease_ttl_s
START_TIMEOUT_S = 30.0
"""A second of a processor, on a machine that may be busy: neither Ray nor vLLM is loaded."""
UNKNOWN = "no prefill server is known"


@contextmanager
def proxy_process(endpoint: str, log: Path) -> Iterator[str]:
    """A running proxy's URL."""
    port = free_port()
    command = [sys.executable, "-m", "serve_app.cli", "proxy", "--port", str(port)]
    with log.open("wb") as output:
        process = start_tied([*command, "--etcd", endpoint], output, folder=ROOT)
    try:
        eventually(lambda: _listens(process, port, log), START_TIMEOUT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return bool(get(f"http://127.0.0.1:{port}/health"))
    except OSError:
        return False


def health(url: str) -> dict[str, str]:
    return dict(json.loads(get(f"{url}/health")[1]))


def whose_prompt(url: str) -> str:
    """The prefill server that a request's prompt was computed by."""
    answer = post(f"{url}/v1/completions", {"model": "m", "prompt": "Hi"})
    return str(answer["choices"][0]["text"])


def test_a_server_whose_deletion_etcd_compacted_away_is_asked_no_more(tmp_path: Path) -> None:
    """The proxy is cut off while it leaves, and etcd forgets the history up to that very change."""
    with (
        EtcdServer() as etcd,
        Relays() as relays,
        admin(etcd) as client,
        registered_server(etcd.endpoint, "leaving", "kv_producer") as leaving,
        registered_server(etcd.endpoint, "staying", "kv_consumer"),
    ):
        relay = relays.instead_of(f"tcp://{etcd.endpoint}").removeprefix("tcp://")
        with proxy_process(relay, tmp_path / "proxy.log") as url:
            eventually(lambda: health(url)["status"] == "ok")
            assert whose_prompt(url) == "leaving"

            relays.set(Link.REFUSED)
            leave(leaving)
            key = record_key("default", PeerId("leaving", 0))
            deleted = client.get_response(key)
            assert not deleted.kvs
            client.compact(deleted.header.revision, physical=True)
            assert health(url)["prefill"] != UNKNOWN
            relays.set(Link.OPEN)

            eventually(lambda: health(url)["prefill"] == UNKNOWN, LEASE_S + 3.0)
            assert health(url)["decode"] == "ok"
            assert whose_prompt(url) == "nobody"
            with registered_server(etcd.endpoint, "coming", "kv_producer"):
                eventually(lambda: health(url)["status"] == "ok", 3.0)
                assert {whose_prompt(url) for _ in range(5)} == {"coming"}
