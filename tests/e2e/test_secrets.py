"""No secret is in anything that a running application shows or leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.servers.baton_app import BatonApp, write_config
from tests.support.servers.etcd_server import EtcdServer
from tests.support.servers.vllm_server import metric

pytestmark = pytest.mark.timeout(600)

IN_FILE, NEWER = "key-that-is-in-a-file", "key-that-came-later"
IN_VARIABLE, BESIDE_IT = "key-in-a-variable", "key-on-its-second-line"
NOT_ONE = "key-of-nobody-at-all"
PASSWORD = "password-of-etcd"
PROMPT = "words of a prompt that nobody else needs to see"
MODEL = "tiny"
DASHBOARD_PAGES = (
    *("serve/applications/", "jobs/", "cluster_status", "v0/nodes?detail=1"),
    *("v0/actors?detail=1", "v0/workers?detail=1", "v0/tasks?detail=1", "v0/runtime_envs?detail=1"),
)


@dataclass(frozen=True)
class Guarded:
    """A running application with secrets of every kind."""

    app: BatonApp
    keys: Path

    @property
    def run_folder(self) -> Path:
        match = re.search(r"logs: (\S+)", self.app.log.read_text())
        assert match is not None
        return Path(match[1])

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.app.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    @property
    def ray_token(self) -> str:
        return (self.run_folder / "ray-token").read_text()

    @property
    def secrets(self) -> list[str]:
        keys = [IN_FILE, NEWER, IN_VARIABLE, BESIDE_IT, NOT_ONE]
        return [*keys, PASSWORD, PROMPT, self.ray_token]

    def ask(self, url: str, bearer: str = "", body: object = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers), timeout=60
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def workers(self, side: str) -> list[dict[str, Any]]:
        code, text = self.ask(f"{self.app.url}/baton/status", IN_VARIABLE)
        assert code == 200
        return list(json.loads(text)[side])

    def models(self, key: str = "") -> int:
        return self.ask(f"{self.app.url}/v1/models", key)[0]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("secrets")
    keys = folder / "keys"
    keys.write_text(IN_FILE)
    password = folder / "password"
    password.write_text(PASSWORD + "\n")
    with EtcdServer() as etcd:
        etcd.enable_users(PASSWORD)
        config = write_config(
            folder,
            model=str(tiny_model),
            model_id=MODEL,
            router={
                "api_keys": [f"file:{keys}", "${BATON_TEST_KEY}"],
                "cache_salt_by_key": True,
            },
            discovery={
                "kind": "etcd",
                "endpoints": [etcd.endpoint],
                "user": "baton",
                "password": f"file:{password}",
            },
        )
        variable = {"BATON_TEST_KEY": f"{IN_VARIABLE}\n{BESIDE_IT}"}
        with BatonApp(config, folder / "up.log", variable, ["--dashboard"]) as app:
            deadline_s = time.monotonic() + 30
            while "Ctrl-C" not in app.log.read_text():
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            yield Guarded(app, keys)


def test_keys_are_asked_for_and_change_while_engines_run(guarded: Guarded) -> None:
    assert [guarded.models(key) for key in ("", NOT_ONE, IN_FILE, IN_VARIABLE)] == [
        401,
        401,
        200,
        200,
    ]
    body = {"model": MODEL, "prompt": [5, 6, 7] * 30, "max_tokens": 3}
    code, answer = guarded.ask(f"{guarded.app.url}/v1/completions", IN_FILE, body)
    assert code == 200, answer
    before = _engines(guarded)

    new = guarded.keys.with_suffix(".new")
    new.write_text(NEWER + "\n")
    new.replace(guarded.keys)
    deadline_s = time.monotonic() + 10
    while guarded.models(NEWER) != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert [guarded.models(key) for key in (IN_FILE, IN_VARIABLE)] == [401, 200]
    assert _engines(guarded) == before


def _engines(guarded: Guarded) -> list[str]:
    workers = [*guarded.workers("prefill"), *guarded.workers("decode")]
    return [worker["engine_id"] for worker in workers]


def test_the_dashboard_wants_the_token_of_the_run_and_shows_references(guarded: Guarded) -> None:
    match = re.search(r"dashboard: (\S+) \(token: (\S+)\)", guarded.app.log.read_text())
    assert match is not None
    assert Path(match[2]) == guarded.run_folder / "ray-token"
    shown = {}
    for page in DASHBOARD_PAGES:
        url = f"{match[1]}/api/{page}"
        assert guarded.ask(url)[0] == 401
        assert guarded.ask(url, "0" * 64)[0] == 403
        code, shown[page] = guarded.ask(url, guarded.ray_token)
        assert code == 200, page
    settings = shown["serve/applications/"]
    assert f"file:{guarded.keys}" in settings
    assert "${BATON_TEST_KEY}" in settings
    assert _with_secrets(guarded, shown) == {}


def test_commands_of_serve_take_the_token_from_the_environment(guarded: Guarded) -> None:
    match = re.search(r"dashboard: (\S+) ", guarded.app.log.read_text())
    assert match is not None
    serve = str(Path(sys.executable).with_name("serve"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{guarded.run_folder}/ray-token"}
    for environment, code in (({**os.environ, **token}, 0), (dict(os.environ), 1)):
        done = subprocess.run(
            [serve, "status", "--address", match[1]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert ("RUNNING" in done.stdout) == (code == 0)


def test_ray_answers_nobody_without_the_token(guarded: Guarded) -> None:
    driver = next(
        one for one in guarded.processes() if "serve_app.launch.serve_driver" in one.cmdline()
    ).environ()
    assert driver["RAY_AUTH_MODE"] == "token"

    def ray_status(environment: dict[str, str]) -> int:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "status", "--address", driver["RAY_ADDRESS"]]
        return subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode

    assert ray_status(driver) == 0
    wrong = {**driver, "RAY_AUTH_TOKEN": "0" * 64}
    assert ray_status(wrong) != 0
    assert ray_status({**driver, "RAY_AUTH_MODE": "disabled"}) != 0


def test_equal_prompts_of_two_keys_share_nothing_and_of_one_key_do(guarded: Guarded) -> None:
    (prefill,) = guarded.workers("prefill")
    prompt = [random.Random(7).randrange(3, 200) for _ in range(96)]

    def moved(key: str, **salt: str) -> int:
        """Tokens that decode did not have already."""
        before = guarded.workers("decode")[0]["totals"]["tokens"]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, **salt}
        code, answer = guarded.ask(f"{guarded.app.url}/v1/completions", key, body)
        assert code == 200, answer
        return int(guarded.workers("decode")[0]["totals"]["tokens"] - before)

    def looked_up(what: str) -> float:
        """Tokens of which prefill asked its prefix cache, or that it found there."""
        text = guarded.ask(f"{guarded.app.url}/metrics")[1]
        name = f"ray_vllm_prefix_cache_{what}_total"
        return metric(text, name, ReplicaId=prefill["replica_id"])

    before = {what: looked_up(what) for what in ("queries", "hits")}
    asked = [moved(key) for key in (IN_VARIABLE, IN_VARIABLE, BESIDE_IT, BESIDE_IT)]
    asked += [moved(BESIDE_IT, cache_salt=own) for own in ("blue", "blue", "green")]
    whole, rest = asked[:2]
    assert 0 < rest < whole
    assert asked == [whole, rest, whole, rest, whole, rest, whole]

    deadline_s = time.monotonic() + 40
    while looked_up("queries") < before["queries"] + len(asked) * len(prompt):
        assert time.monotonic() < deadline_s
        time.sleep(1)
    # Three of them were there before, but for the block that must be computed.
    assert looked_up("hits") == before["hits"] + 3 * 64


def test_what_is_open_to_everybody(guarded: Guarded) -> None:
    paths = ("/health", "/metrics", "/-/healthz", "/-/routes")
    for path in paths:
        assert guarded.ask(f"{guarded.app.url}{path}")[0] == 200, path
    for path in ("/", "/baton/status", "/v1/models", "/docs", "/openapi.json", "/no/such/path"):
        assert guarded.ask(f"{guarded.app.url}{path}")[0] == 401, path


def test_a_browser_may_ask_whether_it_may_call_and_has_no_key_yet(guarded: Guarded) -> None:
    connection = http.client.HTTPConnection(guarded.app.url.removeprefix("http://"), timeout=30)
    asks = {
        "Origin": "https://pages.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    try:
        connection.request("OPTIONS", "/v1/chat/completions", headers=asks)
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    assert response.status == 200
    assert response.getheader("Access-Control-Allow-Origin") in ("*", asks["Origin"])
    assert "POST" in response.getheader("Access-Control-Allow-Methods", "")
    allowed = response.getheader("Access-Control-Allow-Headers", "").lower()
    assert {"authorization", "content-type"} <= {name.strip() for name in allowed.split(",")}


def test_no_secret_is_left_anywhere(guarded: Guarded) -> None:
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "max_tokens": -1}):
        guarded.ask(f"{guarded.app.url}/v1/completions", IN_VARIABLE, {"model": MODEL, **body})
    places = {
        f"answer to {key or 'nobody'} at {path}": guarded.ask(
            f"{guarded.app.url}{path}", key, body
        )[1]
        for key in ("", NOT_ONE, IN_VARIABLE)
        for path, body in (
            ("/v1/models", None),
            ("/v1/completions", {"model": MODEL, "prompt": 5, "cache_salt": 5}),
            ("/v1/completions", {"model": "no-such-model", "prompt": "x"}),
            ("/no/such/path", None),
            ("/baton/status", None),
            ("/metrics", None),
            ("/health", None),
        )
    }
    with_settings = set()
    for file in (*guarded.run_folder.rglob("*"), guarded.app.log):
        if file.is_file() and not file.is_symlink() and file.name != "ray-token":
            places[str(file)] = data = file.read_text("latin-1")
            if "BATON_TEST_KEY" in data:
                with_settings.add(file.name)
    # Settings do get around: what is written out there is seen.
    assert {"config.yaml", "serve.log"} < with_settings
    for process in guarded.processes():
        places[f"arguments of {process.pid}"] = " ".join(process.cmdline())
    assert _with_secrets(guarded, places) == {}


def _with_secrets(guarded: Guarded, places: dict[str, str]) -> dict[str, list[str]]:
    found = {
        place: [secret for secret in guarded.secrets if secret in text]
        for place, text in places.items()
    }
    return {place: secrets for place, secrets in found.items() if secrets}


def test_what_is_written_is_for_its_user_alone(guarded: Guarded) -> None:
    folder = guarded.run_folder
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [file for file in folder.iterdir() if file.is_file()]
    assert {"config.yaml", "ray-token", "serve.log", "status.json"} <= {one.name for one in files}
    assert {one.name: oct(one.stat().st_mode & 0o777) for one in files} == {
        one.name: oct(0o600) for one in files
    }
    assert os.getuid() == folder.stat().st_uid
