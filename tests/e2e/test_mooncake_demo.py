"""The demo's way, command for command: two nodes, a mooncake.json, etcd, stock servers, a proxy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve_app.launch.demo_model import ensure_demo_model
from serve_app.launch.etcd_binary import find_etcd
from tests.support.servers.nodes import Node, NoNamespaces, two_nodes
from tests.support.servers.vllm_server import CPU_ENV, metric

pytestmark = pytest.mark.timeout(480)

START_TIMEOUT_S = 240.0
SAN_FRANCISCO = {"prompt": "San Francisco is a", "max_tokens": 1000, "temperature": 0}
LONG = "The tides follow the moon. " * 60
PRODUCER = {
    "kv_connector": "BatonConnector",
    "kv_connector_module_path": "transfer.connector",
    "kv_role": "kv_producer",
}
KEY = "a key of the demo"


@dataclass(frozen=True)
class Demo:
    """The demo running: the prefill node, the decode node, and where the proxies listen."""

    prefill: Node
    decode: Node
    model: str
    decode_server: subprocess.Popen[bytes]
    proxy: str
    finding_proxy: str

    def complete(self, url: str, **body: Any) -> dict[str, Any]:
        headers = {} if url == self.finding_proxy else {"Authorization": f"Bearer {KEY}"}
        status, text = self.prefill.ask(
            f"{url}/v1/completions", {"model": self.model, **body}, headers
        )
        assert status == 200, text
        return dict(json.loads(text))

    def alone(self, **body: Any) -> str:
        """What the decode server says when it computes the prompt itself."""
        answer = self.complete(f"http://{self.decode.address}:8200", cache_salt="alone", **body)
        return str(answer["choices"][0]["text"])

    def counts(self, node: Node, port: int, name: str, **labels: str) -> float:
        status, text = node.ask(f"http://{node.address}:{port}/metrics")
        assert status == 200
        return metric(text, name, **labels)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    model = str(ensure_demo_model(print))
    try:
        with two_nodes() as (prefill, decode):
            yield _start(folder, model, prefill, decode)
    except NoNamespaces as reason:
        pytest.skip(f"needs two network namespaces as nodes: {reason}")


def _start(folder: Path, model: str, prefill: Node, decode: Node) -> Demo:
    mooncake = folder / "mooncake.json"
    mooncake.write_text(
        json.dumps(
            {
                "local_url": f"{prefill.address}:13003",
                "remote_url": f"{decode.address}:13003",
                "metadata_server": f"{decode.address}:2379",
                "protocol": "tcp",
                "device_name": "",
            }
        )
    )

    def environment(node: Node, role: str) -> dict[str, str]:
        return {
            **CPU_ENV,
            "VLLM_HOST_IP": node.address,
            "VLLM_PORT": "51000",
            "MASTER_ADDR": prefill.address,
            "MASTER_PORT": "54324",
            "MC_GID_INDEX": "3",
            "VLLM_USE_MODELSCOPE": "False",
            "VLLM_DISTRIBUTED_KV_ROLE": role,
            "MOONCAKE_CONFIG_PATH": str(mooncake),
        }

    client = f"http://{decode.address}:2379"
    etcd_log = folder / "etcd.log"
    etcd = decode.start(
        [
            *(str(find_etcd()), "--data-dir", str(folder / "etcd")),
            *("--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", client),
            "--unsafe-no-fsync",
        ],
        etcd_log,
        {},
    )
    decode.wait_for(f"{client}/health", etcd, etcd_log, 15.0)
    options = [
        *("--model", model, "--served-model-name", "demo", "--max-model-len", "2048"),
        *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--distributed-executor-backend", "uni"),
        *("--gpu-memory-utilization", "0.5", "--api-key", KEY),
    ]
    logs = [folder / f"{name}.log" for name in ("prefill", "decode", "proxy", "finding-proxy")]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    baton = [sys.executable, "-m", "serve_app.cli"]
    one = prefill.start(
        [*server, *options, "--port", "8100", "--kv-transfer-config", json.dumps(PRODUCER)],
        logs[0],
        environment(prefill, "producer"),
    )
    two = decode.start(
        [*baton, "vllm-serve", *options, "--port", "8200"],
        logs[1],
        environment(decode, "consumer"),
    )
    urls = [f"http://{prefill.address}:8100", f"http://{decode.address}:8200"]
    prefill.wait_for(f"{urls[0]}/health", one, logs[0], START_TIMEOUT_S)
    prefill.wait_for(f"{urls[1]}/health", two, logs[1], START_TIMEOUT_S)
    proxies = [
        prefill.start(
            [*baton, "proxy", "--port", "8000", "--prefill", urls[0], "--decode", urls[1]],
            logs[2],
            {},
        ),
        # Finds the decode server through etcd, and has the key for both.
        prefill.start(
            [*baton, "proxy", "--port", "8001", "--prefill", urls[0]],
            logs[3],
            {"MOONCAKE_CONFIG_PATH": str(mooncake), "OPENAI_API_KEY": KEY},
        ),
    ]
    for port, process, log in zip((8000, 8001), proxies, logs[2:], strict=True):
        prefill.wait_for(f"http://127.0.0.1:{port}/health", process, log, 30.0)
    return Demo(prefill, decode, "demo", two, "http://127.0.0.1:8000", "http://127.0.0.1:8001")


def _read_bytes(demo: Demo) -> float:
    return demo.counts(demo.decode, 8200, "baton:transfer_bytes_total")


def test_the_demos_curl_gets_the_text_of_one_server(demo: Demo) -> None:
    before = _read_bytes(demo)
    with ThreadPoolExecutor(2) as both:  # at once, for each takes about a minute
        handed_over = both.submit(demo.complete, demo.proxy, **SAN_FRANCISCO)
        alone = both.submit(demo.alone, **SAN_FRANCISCO)
        choice = handed_over.result()["choices"][0]
        assert choice["text"] == alone.result()
    assert len(choice["text"]) > 100
    assert _read_bytes(demo) > before


def test_a_longer_prompt_moves_over_tcp_between_the_nodes(demo: Demo) -> None:
    before = _read_bytes(demo)
    body = {"prompt": LONG, "max_tokens": 20, "temperature": 0}

    answer = demo.complete(demo.finding_proxy, **body)

    assert answer["choices"][0]["text"] == demo.alone(**body)
    assert answer["usage"]["completion_tokens"] == 20
    tokens = demo.counts(demo.decode, 8200, "baton:transfer_tokens_total")
    assert tokens > answer["usage"]["prompt_tokens"] - 32
    # Keys and values of 30 layers, 3 heads of 64, 4 bytes each.
    assert _read_bytes(demo) - before >= answer["usage"]["prompt_tokens"] * 30 * 2 * 3 * 64 * 4
    assert demo.counts(demo.decode, 8200, "baton:recomputed_tokens_total") == 0
    assert demo.counts(demo.prefill, 8100, "baton:pinned_blocks") == 0


def test_chat_streams_through(demo: Demo) -> None:
    body = {
        "model": demo.model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
    }
    status, text = demo.prefill.ask(f"{demo.finding_proxy}/v1/chat/completions", body)

    assert status == 200
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "Paris" in "".join(delta.get("content") or "" for delta in deltas)


WHOLE = 2048
"""The servers' ``--max-model-len``."""
RIVERS = "Rivers run down to the sea. " * 60
HILLS = "The hills are older than the sea. " * 60


@pytest.mark.parametrize(
    ("path", "body", "is_read"),
    [
        ("completions", {"prompt": RIVERS, "logprobs": 2, "logprob_token_ids": [50, 60]}, True),
        ("chat/completions", {"content": HILLS, "truncate_prompt_tokens": 200}, True),
        ("chat/completions", {"content": "Hi", "truncate_prompt_tokens": WHOLE}, False),
        ("completions", {"prompt": LONG * 6, "truncate_prompt_tokens": -1}, False),
        ("chat/completions", {"content": "Hi", "echo": True}, False),
    ],
    ids=["ids of logprobs", "cut", "cut to the model", "cut to the room", "echo"],
)
def test_answers_are_those_of_one_server(
    demo: Demo, path: str, body: dict[str, Any], is_read: bool
) -> None:
    if content := body.get("content"):
        # As many tokens as there is room for, or until the first blank.
        asked = {**body, "messages": [{"role": "user", "content": content}], "stop": [" "]}
        del asked["content"]
    else:
        asked = {**body, "max_tokens": 9}
    before = _read_bytes(demo)

    answers = [
        demo.prefill.ask(
            f"{url}/v1/{path}",
            {"model": demo.model, "temperature": 0, **asked, **more},
            {"Authorization": f"Bearer {KEY}"},
        )
        for url, more in (
            (demo.proxy, {}),
            (f"http://{demo.decode.address}:8200", {"cache_salt": "alone"}),
        )
    ]

    assert [status for status, _ in answers] == [200, 200]
    (ours, near), (alone, numbers) = (_without_numbers(text) for _, text in answers)
    assert ours["usage"] == alone["usage"]
    assert ours["choices"] == alone["choices"]
    assert near == pytest.approx(numbers, abs=1e-3)  # a prompt's last token is computed alone
    assert (_read_bytes(demo) > before) is is_read


@pytest.mark.parametrize(
    ("change", "headers", "status", "said"),
    [
        ({"model": "nobody"}, {"Authorization": f"Bearer {KEY}"}, 404, "nobody"),
        ({"max_tokens": 1 << 20}, {"Authorization": f"Bearer {KEY}"}, 400, "max_tokens"),
        ({}, {"Authorization": "Bearer wrong"}, 401, "nauthorized"),
        ({}, {}, 401, "nauthorized"),
    ],
    ids=["model", "too many tokens", "wrong key", "no key"],
)
def test_errors_pass_through(
    demo: Demo, change: dict[str, Any], headers: dict[str, str], status: int, said: str
) -> None:
    body = {"model": demo.model, "prompt": "Hi", "max_tokens": 2, **change}
    got, text = demo.prefill.ask(f"{demo.proxy}/v1/completions", body, headers)
    direct, as_given = demo.prefill.ask(
        f"http://{demo.decode.address}:8200/v1/completions", body, headers
    )

    assert (got, direct) == (status, status)
    assert said in text
    assert text == as_given


def test_a_client_that_leaves_ends_both(demo: Demo) -> None:
    body = {"model": demo.model, **SAN_FRANCISCO, "stream": True}

    demo.prefill.leave(f"{demo.finding_proxy}/v1/completions", body, {}, after_events=2)

    for node, port in ((demo.prefill, 8100), (demo.decode, 8200)):
        _until(lambda: demo.counts(node, port, "vllm:num_requests_running") == 0)  # noqa: B023
    # Also not by the request that decode refused after prefill had computed it.
    _until(lambda: demo.counts(demo.prefill, 8100, "baton:pinned_blocks") == 0)


def test_without_decode_the_answer_is_503_and_nothing_stays_pinned(demo: Demo) -> None:
    """The last one here: it takes the decode server away."""
    demo.decode_server.kill()
    demo.decode_server.wait(10)
    body = {"model": demo.model, "prompt": LONG, "max_tokens": 2}

    status, text = demo.prefill.ask(f"{demo.finding_proxy}/v1/completions", body)

    assert status == 503
    assert json.loads(text)["error"]["type"] == "server_error"
    _until(lambda: demo.counts(demo.prefill, 8100, "baton:pinned_blocks") == 0)
    assert demo.counts(demo.prefill, 8100, "baton:handoffs_total", outcome="aborted") == 1
    assert demo.counts(demo.prefill, 8100, "baton:handoffs_total", outcome="expired") == 0


def _without_numbers(text: str) -> tuple[dict[str, Any], list[float]]:
    """A JSON object, and its log-probabilities, which are not in it any more."""
    numbers: list[float] = []
    return json.loads(text, parse_float=lambda number: numbers.append(float(number))), numbers


def _until(condition: Callable[[], bool]) -> None:
    """Well before an offer would expire by itself."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
